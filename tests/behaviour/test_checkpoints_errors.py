"""Every error is one sentence that says what was found and, where that helps, what is expected."""

import json
import re
import zipfile

import pytest
import torch

from fluxedu.checkpoints import (
    convert,
    convert_file,
    from_diffusers_config,
    load_into,
    load_model,
    read,
    save_file,
    save_folder,
)
from fluxedu.errors import CheckpointError
from fluxedu.models import AutoEncoder, AutoEncoderConfig, Flux, FluxConfig, T5Config, T5Encoder

TINY = FluxConfig(
    in_channels=4,
    out_channels=4,
    vec_in_dim=6,
    context_in_dim=5,
    hidden_size=16,
    num_heads=2,
    axes_dim=(2, 2, 4),
    depth=1,
    depth_single_blocks=1,
)
AE = AutoEncoderConfig(ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=2, norm_groups=2)
NO_GUIDANCE = TINY.with_(guidance_embed=False)


def flux_state(config=TINY):
    return dict(Flux(config).state_dict())


def says(sentence, function, *arguments, **options):
    """The call raises CheckpointError with this sentence (a string, or a pattern)."""
    with pytest.raises(CheckpointError) as error:
        function(*arguments, **options)
    text = str(error.value)
    assert text == sentence if isinstance(sentence, str) else re.fullmatch(sentence, text), text
    assert "\n" not in text and text.endswith(".")


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_missing_keys_extra_keys_and_wrong_shapes(layout):
    state = convert(flux_state(), to=layout, config=TINY)
    name = next(iter(state))
    other = "diffusers" if layout == "bfl" else "bfl"

    def attempt(changed):
        convert(changed, to=other, config=TINY)

    less = {k: v for k, v in state.items() if k != name}
    says(f"the state dict lacks the key '{name}'.", attempt, less)
    says(
        "the state dict has an unexpected key 'ema' (and 1 more).",
        attempt,
        {**state, "ema": torch.ones(1), "z": torch.ones(1)},
    )
    says(
        f"the state dict lacks the key '{name}' and has an unexpected key 'ema'.",
        attempt,
        {**less, "ema": torch.ones(1)},
    )
    shape = list(state[name].shape)
    wrong = {**state, name: torch.ones(3, 3)}
    says(f"the state dict has '{name}' in shape [3, 3], but it should be {shape}.", attempt, wrong)


def test_load_into_is_as_strict_and_changes_nothing(tmp_path):
    flux, state = Flux(TINY), flux_state()
    before = {name: tensor.clone() for name, tensor in flux.state_dict().items()}
    dropped = [name for name in state if name.startswith("final_layer.linear")]
    save_file({k: v for k, v in state.items() if k not in dropped}, tmp_path / "f.safetensors")
    says(
        "f.safetensors lacks the key 'final_layer.linear.weight' (and 1 more).",
        load_into,
        flux,
        read(tmp_path / "f.safetensors"),
    )
    layer = torch.nn.Linear(2, 3)
    says(
        "the state dict has 'weight' in shape [3, 1], but it should be [3, 2].",
        load_into,
        layer,
        {"weight": torch.ones(3, 1), "bias": torch.ones(3)},
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in flux.state_dict().items())


def test_a_wrong_variant_is_named():
    with torch.device("meta"):
        schnell, dev, fill = (Flux(FluxConfig.variant(name)) for name in ("schnell", "dev", "fill"))
    says(
        "the state dict is FLUX.1 schnell, but the config is that of FLUX.1 dev (or krea, kontext): "
        "guidance_embed is False, not True.",
        load_into,
        dev,
        schnell.state_dict(),
    )
    says(
        "the state dict is FLUX.1 fill, but the config is that of FLUX.1 dev (or krea, kontext): "
        "in_channels is 384, not 64.",
        convert,
        fill.state_dict(),
        to="diffusers",
        config=FluxConfig.variant("dev"),
    )
    says(
        "the state dict is a FLUX network of 1 + 1 blocks, 16 wide, but the config is that of "
        "a FLUX network of 2 + 1 blocks, 16 wide: depth is 1, not 2, guidance_embed is False, not True.",
        convert,
        flux_state(NO_GUIDANCE),
        to="diffusers",
        config=TINY.with_(depth=2),
    )
    theirs = convert(flux_state(NO_GUIDANCE), to="diffusers")
    says(
        "the state dict is a FLUX network of 1 + 1 blocks, 16 wide, but the config is that of "
        "a FLUX network of 1 + 1 blocks, 16 wide: guidance_embed is False, not True.",
        convert,
        theirs,
        to="bfl",
        config=TINY,
    )


def test_another_network_or_layout():
    flux, ae = Flux(TINY), AutoEncoder(AE)
    says("the state dict is an autoencoder, but a flow transformer is needed.", load_into, flux, ae.state_dict())
    says(
        "the state dict is a T5 encoder, but an autoencoder is needed.",
        load_into,
        ae,
        T5Encoder(T5Config(9, 8, 2, 4, 1, 2)).state_dict(),
    )
    theirs = convert(flux.state_dict(), to="diffusers")
    says("the state dict is in diffusers's layout, but bfl's is needed; convert it first.", load_into, flux, theirs)
    says("there is no layout called 'kohya'; there are bfl and diffusers.", convert, theirs, to="kohya")
    says(
        "the state dict is no network of FLUX.1 or FLUX.2: 'a' is none of its names.",
        convert,
        {"a": torch.ones(1)},
        to="bfl",
    )
    part = {"img_in.weight": torch.ones(4, 4)}
    incomplete = "the state dict is too incomplete to infer its configuration ({}); pass config."
    says(incomplete.format("'final_layer.linear.weight' is missing"), convert, part, to="bfl")
    part = {"img_in.weight": torch.ones(4), "final_layer.linear.weight": torch.ones(4, 4)}
    says(incomplete.format("'img_in.weight' is [4]"), convert, part, to="bfl")


def test_parts_of_one_tensor_must_have_one_dtype():
    theirs = convert(flux_state(), to="diffusers")
    theirs["transformer_blocks.0.attn.to_k.weight"] = theirs["transformer_blocks.0.attn.to_k.weight"].half()
    says(
        "'transformer_blocks.0.attn.to_q.weight' is torch.float32 "
        "and 'transformer_blocks.0.attn.to_k.weight' is torch.float16, "
        "but they are parts of one tensor, 'double_blocks.0.img_attn.qkv.weight', and must have the same dtype.",
        convert,
        theirs,
        to="bfl",
    )


def test_axes_dim_does_not_follow_from_the_shapes(tmp_path):
    from safetensors.torch import save_file as plain_save

    plain_save(flux_state(), tmp_path / "f.safetensors")
    says(
        re.compile("the shapes in f.safetensors leave the configuration open, pass config: .*axes_dim.*"),
        convert_file,
        tmp_path / "f.safetensors",
        tmp_path / "out",
        to="diffusers",
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.safetensors"]


# -- files


def test_files_cut_short_or_damaged(tmp_path):
    path = tmp_path / "f.safetensors"
    save_file(flux_state(), path)
    intact = path.read_bytes()
    for length in (len(intact) - 1, len(intact) // 2):
        path.write_bytes(intact[:length])
        says(f"f.safetensors is cut short: it has {length:,} bytes, its header promises {len(intact):,}.", read, path)
    header = 8 + int.from_bytes(intact[:8], "little")
    path.write_bytes(intact[:100])
    says(f"f.safetensors is cut short: it has 100 bytes, its header alone {header:,}.", read, path)
    path.write_bytes(intact[:5])
    says("f.safetensors is cut short: it has only 5 bytes.", read, path)
    path.write_bytes(b"")
    says("f.safetensors is cut short: it has only 0 bytes.", read, path)
    path.write_bytes(intact + b"x")
    says(
        f"f.safetensors is too long: it has {len(intact) + 1:,} bytes, its header promises {len(intact):,}.", read, path
    )
    path.write_bytes(intact[:8] + b"{" + b"?" * (header - 9) + intact[header:])
    says("f.safetensors has a damaged header and is not a safetensors file.", read, path)
    path.write_bytes(b"GIF8" + intact)
    says("f.safetensors is not a safetensors file (it begins with b'GIF8" + repr(intact[:4])[2:-1] + "').", read, path)


def handmade(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def damaged(reason):
    """The sentence about a damaged header; the reason is in the safetensors library's words."""
    return re.compile(rf"f.safetensors has a damaged header \(.*({reason}).*\)\.")


def test_headers_that_do_not_fit_the_data(tmp_path):
    path = tmp_path / "f.safetensors"
    handmade(path, {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8))
    says(damaged("shape, data type, or offset|TensorInvalidInfo"), read, path)
    handmade(path, {"a": {"dtype": "F5", "shape": [3], "data_offsets": [0, 12]}}, bytes(12))
    says(damaged("F5"), read, path)
    handmade(path, {"a": {"dtype": "U16", "shape": [3], "data_offsets": [0, 6]}}, bytes(6))
    says(re.compile("f.safetensors has 'a' in dtype U16, not one of F64, .*"), read, path)
    handmade(path, {"a": {"dtype": "F32"}})
    says("f.safetensors has a damaged header and is not a safetensors file.", read, path)
    handmade(path, {})
    says("f.safetensors holds no tensors.", read, path)
    one, two = ({"dtype": "U8", "shape": [2], "data_offsets": ends} for ends in ([0, 2], [1, 3]))
    handmade(path, {"a": one, "b": two}, bytes(3))
    says(damaged(".*offset.*b"), read, path)
    handmade(path, {"a": one, "b": {**one, "data_offsets": [3, 5]}}, bytes(5))
    says(damaged(".*offset.*b"), read, path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": "08"}},
        {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
        {"a": [], "__metadata__": {}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"x": 1}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": []},
    ],
)
def test_headers_with_values_of_the_wrong_type(header, tmp_path):
    handmade(tmp_path / "f.safetensors", header, bytes(8))
    says(re.compile(r"f.safetensors has a damaged header( \(.*\)| and .*)\."), read, tmp_path / "f.safetensors")


def test_a_key_that_occurs_twice(tmp_path):
    """JSON allows it, and Python keeps the last value without a warning: two readers could load two networks."""
    path, entry = tmp_path / "f.safetensors", '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
    text = f'{{"a":{entry},"a":{entry}}}'.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(2))
    says("f.safetensors has a damaged header and is not a safetensors file.", read, path)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_refused_whatever_they_are_called(tmp_path, name, legacy):
    torch.save({"a": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    sentence = f"{name} is a pickle, which can run code when opened; fluxedu reads .safetensors only."
    says(sentence, read, tmp_path / name)
    says(sentence, load_model, tmp_path / name)
    if not name.endswith("safetensors"):
        says(sentence, read, tmp_path)


def test_paths_without_a_checkpoint(tmp_path):
    says(f"there is no file or folder {tmp_path / 'none'}.", read, tmp_path / "none")
    says(f"{tmp_path} contains no .safetensors file.", read, tmp_path)
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        save_file({"a": torch.ones(1)}, tmp_path / part / "a.safetensors")
    says(
        f"{tmp_path} contains no .safetensors file, but its subfolders transformer, vae do; pass one of them.",
        read,
        tmp_path,
    )
    for name in "ab":
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    says(
        f"{tmp_path.name} has no index but 2 .safetensors files; name one of a.safetensors, b.safetensors.",
        read,
        tmp_path,
    )


def test_shards_and_their_index(tmp_path):
    folder = save_folder(flux_state(), tmp_path / "t", TINY, max_shard_bytes=20_000)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    original, first = index.read_text(), sorted(folder.glob("*.safetensors"))[0]
    content = json.loads(original)
    name = next(n for n, shard in content["weight_map"].items() if shard == first.name)

    def write_index(weight_map):
        index.write_text(json.dumps({"weight_map": weight_map}))

    write_index({**content["weight_map"], "ghost": first.name})
    says(f"{first.name} lacks the key 'ghost' that the index promises.", read, folder)
    write_index({other: shard for other, shard in content["weight_map"].items() if other != name})
    says(f"{first.name} has the key '{name}', which the index does not name.", read, folder)
    write_index({**content["weight_map"], "ghost": "../f.safetensors"})
    says(f"{index.name} names the shard '../f.safetensors', which is not a file beside it.", read, folder)
    index.write_text("[]")
    says(f"{index.name} is not an index of shards (JSON with a weight_map).", read, folder)
    index.write_text(original)
    first.rename(folder / "gone")
    says(f"t lacks the shard '{first.name}' that its index names.", read, folder)


def test_targets_that_exist(tmp_path):
    source, folder = save_file(flux_state(), tmp_path / "f.safetensors", config=TINY), tmp_path / "t"
    copy = convert_file(source, tmp_path / "g.safetensors", to="bfl")
    says(f"{copy} exists already; choose another name, or set overwrite.", convert_file, source, copy, to="bfl")
    folder.mkdir()
    convert_file(source, folder, to="diffusers")  # an empty folder may be replaced
    says(
        f"{folder} exists already; choose another name, or set overwrite.", convert_file, source, folder, to="diffusers"
    )
    convert_file(source, folder, to="diffusers", overwrite=True)
    (folder / "thesis.tex").write_text("…")
    says(
        f"{folder} also holds 'thesis.tex', so it is not replaced.",
        convert_file,
        source,
        folder,
        to="diffusers",
        overwrite=True,
    )
    says(
        "a file of tensors must be called something.safetensors, not 'g.pt'.",
        convert_file,
        source,
        tmp_path / "g.pt",
        to="bfl",
    )
    says(
        "diffusers' layout is a folder, and 'h.safetensors' is the name of a file.",
        convert_file,
        source,
        tmp_path / "h.safetensors",
        to="diffusers",
    )
    (tmp_path / "file").touch()
    says(
        f"{tmp_path / 'file'} is a file, but a folder is to be written there.",
        convert_file,
        source,
        tmp_path / "file",
        to="diffusers",
        overwrite=True,
    )
    says("there is no layout called 'hf'; there are bfl and diffusers.", convert_file, source, tmp_path / "h", to="hf")
    says("a shard needs at least one byte, not 0.", convert_file, source, tmp_path / "h", to="diffusers", shard_bytes=0)
    says(
        "'a' is torch.complex64, which a .safetensors file cannot hold.",
        save_file,
        {"a": torch.ones(1) + 0j},
        tmp_path / "h.safetensors",
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"_class_name": "UNet"}, "config.json is for 'UNet', but should be for FluxTransformer2DModel."),
        ({"patch_size": 2}, "config.json has patch_size 2, but FLUX.1's is 1."),
        ({"norm": "batch"}, "config.json has an unknown setting 'norm' ('batch')."),
        ({"num_attention_heads": 3}, re.compile("config.json describes no valid network: hidden_size .*|.*axes_dim.*")),
    ],
)
def test_a_config_json_of_another_network(values, sentence):
    if "num_attention_heads" in values:
        values = {**values, "attention_head_dim": 7}
    says(sentence, from_diffusers_config, values, FluxConfig)


def test_an_autoencoder_config_with_unsupported_settings(tmp_path):
    folder = save_folder(AutoEncoder(AE).state_dict(), tmp_path / "vae", AE)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "use_quant_conv": True}))
    says("vae: config.json has use_quant_conv True, but FLUX.1's is False.", load_model, folder)
    (folder / "config.json").write_text("{")
    says("vae has a configuration that cannot be read.", load_model, folder)
    wide = AE.with_(ch_mult=(2, 2))
    says(
        "diffusers' layout takes ch as the width of the first level and cannot store ch_mult (2, 2).",
        convert,
        AutoEncoder(wide).state_dict(),
        to="diffusers",
        config=wide,
    )


def test_a_zip_of_anything_is_not_opened(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.safetensors", "w") as file:
        file.writestr("data.pkl", b"cos\nsystem\n(S'false'\ntR.")
    says(
        "x.safetensors is a pickle, which can run code when opened; fluxedu reads .safetensors only.",
        read,
        tmp_path / "x.safetensors",
    )
