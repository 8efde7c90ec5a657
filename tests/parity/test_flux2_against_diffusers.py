"""Flux2 and its autoencoder compute what diffusers' classes compute, and these tests fail if they do not.

Weights are converted to diffusers' names by diffusers' own converter; our converter must agree with it. Every bound is
derived from the case itself (see rounding.py), and is smaller than the fixed ones below.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    REGIMES,
    cast,
    examples,
    last_layer_takes_scale_first,
    layer_norm_eps,
    pyramid_arguments,
    randomise,
    rms_norm_eps,
    transformer_arguments,
)
from rounding import Exact, Float64, WithoutNoise, exact_value, relative_error, worst_error

from fluxedu.checkpoints import convert, from_diffusers_config, infer_config, load_model, shapes, to_diffusers_config
from fluxedu.models import (
    FLUX2_VARIANTS,
    Flux2,
    Flux2AutoEncoder,
    Flux2AutoEncoderConfig,
    Flux2Config,
    attention,
    flux2,
)
from fluxedu.nano.shipped import SHIPPED_MODELS, WEIGHTS

LARGEST_ERROR = {torch.float32: 2e-6, torch.float64: 1e-7}  # of an input of ordinary size, relative, between both

# --- the transformer ------------------------------------------------------------------------------


def diffusers_flux2(config, state):
    """diffusers' model with our weights. Every name and shape must match."""
    with torch.device("meta"):
        theirs = Flux2Transformer2DModel(
            **transformer_arguments(config),
            mlp_ratio=config.mlp_ratio,
            rope_theta=config.theta,
        )
    state = convert_flux2_transformer_checkpoint_to_diffusers(dict(state))
    theirs.load_state_dict(state, strict=True, assign=True)
    return theirs.eval()


def float64_flux2(config, state):
    """diffusers' model in float64, to be run in the mode :class:`rounding.Float64` for an exact result.

    The sinusoidal embedding is a function of a number that is exact, and the angles of RoPE are computed in float64 by
    every implementation, so they get no noise.
    """
    theirs = diffusers_flux2(config, state).double()
    theirs.time_guidance_embed.time_proj = WithoutNoise(theirs.time_guidance_embed.time_proj)
    theirs.pos_embed = WithoutNoise(theirs.pos_embed, Float64)
    return theirs


@dataclass(frozen=True)
class Case:
    """A network, an input, and the seed of their values."""

    config: Flux2Config
    batch: int = 1
    grid: tuple[int, int] = (3, 5)
    txt_len: int = 4
    references: tuple[tuple[int, int], ...] = ()  # rows and columns of each reference image
    regime: str = "unit"
    seed: int = 0

    def model(self):
        model = randomise(Flux2(self.config), self.seed)
        if self.regime == "small":  # so small that the eps of the norms matters as much
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.startswith(("img_in", "txt_in")) or ".qkv." in name:
                        p *= 1e-3
                    elif ".linear1." in name:
                        p[: 3 * self.config.hidden_size] *= 1e-3
        return model

    def inputs(self):
        """The arguments of ``Flux2.forward``, in float32."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        size = 30 if self.regime == "large" else 1
        grids = [(0, *self.grid)] + [(10 * (i + 1), *grid) for i, grid in enumerate(self.references)]
        ids = torch.cat(
            [
                torch.cartesian_prod(
                    torch.tensor([image]), torch.arange(rows), torch.arange(columns), torch.tensor([0])
                )
                for image, rows, columns in grids
            ]
        ).float()
        txt_ids = torch.zeros(self.txt_len, 4)
        txt_ids[:, 3] = torch.arange(self.txt_len)

        def choice(values):
            return values[torch.randint(len(values), (self.batch,), generator=generator)]

        return {
            "img": size * torch.randn(self.batch, len(ids), self.config.in_channels, generator=generator),
            "img_ids": ids.expand(self.batch, -1, -1),
            "txt": size * torch.randn(self.batch, self.txt_len, self.config.context_in_dim, generator=generator),
            "txt_ids": txt_ids.expand(self.batch, -1, -1),
            "timesteps": choice(torch.arange(1025) / 1024),
            "guidance": choice(torch.arange(800) / 16) if self.config.guidance_embed else None,
        }


def run_ours(model, x):
    return model(**x)


def run_theirs(theirs, x):
    return theirs(
        hidden_states=x["img"],
        encoder_hidden_states=x["txt"],
        timestep=x["timesteps"],
        img_ids=x["img_ids"],
        txt_ids=x["txt_ids"],
        guidance=x["guidance"],
        return_dict=False,
    )[0]


def as_float64(x):
    """Without guidance there is nothing to cast."""
    tensors = {n: v for n, v in x.items() if v is not None}
    return x | cast(tensors, torch.float64)


@st.composite
def cases(draw, **fixed):
    """Odd widths, depths, axes, grids, batch sizes, text lengths and reference images."""

    def integer(low, high):
        return draw(st.integers(low, high))

    axes = tuple(2 * integer(1, 5) for _ in range(4))
    heads = integer(1, 3)
    config = Flux2Config(
        in_channels=integer(1, 70),
        out_channels=integer(1, 70),
        context_in_dim=integer(1, 50),
        hidden_size=heads * sum(axes),
        mlp_ratio=draw(st.sampled_from((3.0, 1.5, 2.0))),
        num_heads=heads,
        depth=integer(0, 3),
        depth_single_blocks=integer(0, 3),
        axes_dim=axes,
        theta=draw(st.sampled_from((2_000, 500))),
        guidance_embed=draw(st.booleans()),
    )
    grid = st.tuples(st.integers(1, 4), st.integers(1, 5))
    drawn = {
        "batch": integer(1, 3),
        "grid": (integer(1, 7), integer(1, 9)),
        "txt_len": integer(1, 13),
        "references": tuple(draw(st.lists(grid, max_size=2))),
        "regime": draw(st.sampled_from(REGIMES)),
        "seed": integer(0, 2**31),
    }
    return Case(config, **{**drawn, **fixed})


@torch.no_grad()
def check_velocity(case):
    """Our velocity in float32 and in float64, and diffusers' in float32, are the exact one up to rounding."""
    ours, x = case.model(), case.inputs()
    x64, state = as_float64(x), ours.state_dict()
    theirs, reference = diffusers_flux2(case.config, state), float64_flux2(case.config, state)
    exact = Exact(lambda: run_theirs(reference, x64))
    exact.check(run_theirs(theirs, x), torch.float32)
    exact.check(run_ours(ours, x), torch.float32)
    exact.check(run_ours(ours.double(), x64), torch.float64)


@pytest.mark.parametrize("regime", REGIMES)
def test_velocity(regime):
    @examples(12)
    @given(cases(regime=regime))
    def check(case):
        check_velocity(case)

    check()


TINY = Flux2Config(
    in_channels=12,
    out_channels=20,
    context_in_dim=18,
    hidden_size=48,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 8, 6),
)
WIDE = Flux2Config(context_in_dim=768, hidden_size=512, num_heads=4, depth=2, depth_single_blocks=3)  # heads of 128


@pytest.mark.parametrize("dtype", LARGEST_ERROR, ids=["f32", "f64"])
@pytest.mark.parametrize("guidance", [True, False], ids=["guidance", "no-guidance"])
@torch.no_grad()
def test_the_error_in_numbers(guidance, dtype):
    """Heads, axes and theta of the official size, and two reference images."""
    case = Case(WIDE.with_(guidance_embed=guidance), 2, (6, 4), 11, references=((3, 5), (2, 2)))
    model = case.model()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    if dtype == torch.float32:
        expected = run_theirs(diffusers_flux2(case.config, state), case.inputs())
        error = relative_error(run_ours(model, case.inputs()), expected)
    else:  # theirs computes RoPE in float32 even then, unless told otherwise
        x64, reference = as_float64(case.inputs()), float64_flux2(case.config, state)
        error = relative_error(run_ours(model.double(), x64), exact_value(lambda: run_theirs(reference, x64)))
    assert error <= LARGEST_ERROR[dtype]


@torch.no_grad()
def test_the_shipped_miniature():
    """Its folder opens in both; diffusers reads the configuration and the names of the tensors there itself."""
    folder = WEIGHTS / SHIPPED_MODELS["nano-flux2"].transformer
    theirs = Flux2Transformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).eval()
    ours = load_model(folder, dtype=torch.float32)
    x = Case(ours.config, batch=2, grid=(8, 6), txt_len=32).inputs()
    assert relative_error(run_ours(ours, x), run_theirs(theirs, x)) <= LARGEST_ERROR[torch.float32]


@torch.no_grad()
def test_gradients():
    """By the weights and by the inputs."""
    case = Case(TINY, batch=2, references=((2, 2),), seed=3)
    ours, x64 = case.model().double(), as_float64(case.inputs())
    theirs = float64_flux2(TINY, ours.state_dict())

    def gradients_of(model, run, mode):
        with torch.enable_grad(), mode:
            x = {n: v.clone().requires_grad_() if n in ("img", "txt") else v for n, v in x64.items()}
            model.zero_grad()
            run(model, x).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}, [x["img"].grad, x["txt"].grad]

    by_weights, by_inputs = gradients_of(ours, run_ours, torch.enable_grad())
    expected, expected_inputs = gradients_of(theirs, run_theirs, Float64())
    by_weights = convert_flux2_transformer_checkpoint_to_diffusers(by_weights)
    assert by_weights.keys() == expected.keys()
    assert max(relative_error(by_weights[n], expected[n]) for n in expected) < 1e-7
    assert worst_error(by_inputs, expected_inputs) < 1e-7


# --- the same comparison reveals these mistakes ---------------------------------------------------


def gate_and_value_exchanged(patch, model):
    patch.setattr(flux2.SwiGLU, "forward", lambda self, x: F.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0])


def text_without_positions(patch, model):
    rope = model.rope
    patch.setattr(model, "rope", lambda img_ids, txt_ids: rope(img_ids, torch.zeros_like(txt_ids)))


def theta_of_flux1(patch, model):
    table = attention.rope_table
    patch.setattr("fluxedu.models.flux.rope_table", lambda ids, axes_dim, theta: table(ids, axes_dim, 10_000))


def references_at_one_place(patch, model):
    rope = model.rope
    patch.setattr(model, "rope", lambda img_ids, txt_ids: rope(img_ids.clamp(max=9), txt_ids))


def text_and_image_modulation_exchanged(patch, model):
    txt, img = model.double_stream_modulation_txt, model.double_stream_modulation_img
    patch.setitem(model._modules, "double_stream_modulation_txt", img)
    patch.setitem(model._modules, "double_stream_modulation_img", txt)


def no_guidance(patch, model):
    guidance = model.guidance_in.forward
    patch.setattr(model.guidance_in, "forward", lambda x: torch.zeros_like(guidance(x)))


MISTAKES = {  # and the regime in which each shows
    gate_and_value_exchanged: "unit",
    text_without_positions: "unit",
    theta_of_flux1: "unit",
    references_at_one_place: "unit",
    text_and_image_modulation_exchanged: "unit",
    layer_norm_eps: "small",
    rms_norm_eps: "small",
    no_guidance: "unit",
    last_layer_takes_scale_first: "unit",
}
CLEARLY = 10  # times the bound


@pytest.fixture(scope="module")
def exact_cases():
    found = {}
    for regime in ("unit", "small"):
        case = Case(TINY, batch=2, txt_len=6, references=((2, 3),), regime=regime)
        model, x64 = case.model(), as_float64(case.inputs())
        reference = float64_flux2(TINY, model.state_dict())
        with torch.no_grad():
            found[regime] = model, case.inputs(), Exact(lambda reference=reference, x=x64: run_theirs(reference, x))
    return found


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.__name__)
@torch.no_grad()
def test_a_mistake_is_found(mistake, exact_cases, monkeypatch):
    model, x, exact = exact_cases[MISTAKES[mistake]]
    exact.check(run_ours(model, x), torch.float32)
    with monkeypatch.context() as patch:
        mistake(patch, model)
        assert exact.error_of(run_ours(model, x)) > CLEARLY * exact.bound(torch.float32)
    exact.check(run_ours(model, x), torch.float32)  # the mistake is undone


# --- the autoencoder ------------------------------------------------------------------------------


def autoencoder_to_diffusers(state, config):
    """By diffusers' converter, which knows the names of FLUX.1's autoencoder but not the five of FLUX.2's."""
    top = ("encoder.quant_conv.", "decoder.post_quant_conv.")
    found = {n.split(".", 1)[1] if n.startswith(top) else n: t for n, t in state.items()}
    statistics = {n: t for n, t in found.items() if n.startswith("bn.")}
    return convert_ldm_vae_checkpoint(found, pyramid_arguments(config)) | statistics


def diffusers_autoencoder(config, state):
    with torch.device("meta"):
        theirs = AutoencoderKLFlux2(**pyramid_arguments(config))
    theirs.load_state_dict(autoencoder_to_diffusers(state, config), strict=True, assign=True)
    return theirs.eval()


def autoencoder(config, seed):
    """Random values in every tensor, also in the statistics of the batch norm."""
    model = randomise(Flux2AutoEncoder(config), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model.bn.running_mean.normal_(generator=generator)
    model.bn.running_var.uniform_(0.2, 3, generator=generator)
    return model.eval()


@st.composite
def autoencoders(draw):
    """A config, a batch size, an image size in pixels (mostly not square) and a seed."""
    groups = draw(st.sampled_from((1, 2, 4)))
    levels = draw(st.lists(st.integers(1, 3), max_size=3))
    config = Flux2AutoEncoderConfig(
        in_channels=draw(st.integers(1, 4)),
        out_ch=draw(st.integers(1, 4)),
        ch=groups * draw(st.integers(1, 4)),
        ch_mult=(1, *levels),
        num_res_blocks=draw(st.integers(1, 2)),
        z_channels=draw(st.integers(1, 12)),
        norm_groups=groups,
    )
    patch = 2 * config.downscale
    size = patch * draw(st.integers(1, max(1, 32 // patch))), patch * draw(st.integers(1, max(1, 32 // patch)))
    return config, draw(st.integers(1, 2)), size, draw(st.integers(0, 2**31))


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(latent):
    """As diffusers' pipelines pack: ``[B, z, h, w] -> [B, 4 z, h/2, w/2]``."""
    b, c, h, w = latent.shape
    return latent.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def unpacked(latent):
    b, c, h, w = latent.shape
    return latent.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


def statistics(theirs):
    mean, var = (x.view(1, -1, 1, 1) for x in (theirs.bn.running_mean, theirs.bn.running_var))
    return mean, torch.sqrt(var + theirs.config.batch_norm_eps)


@examples(10)
@given(autoencoders())
@torch.no_grad()
def test_encode_and_decode(network):
    config, batch, size, seed = network
    ours = autoencoder(config, seed)
    state = {n: t.clone() for n, t in ours.state_dict().items()}
    theirs, reference = diffusers_autoencoder(config, state), diffusers_autoencoder(config, state).double()
    image = normal((batch, config.in_channels, *size), seed + 2)

    def our_encodings(model, image):  # they clamp the logarithm of the variance, ours does not
        mean, logvar = model.moments(image)
        return [mean, logvar.clamp(-30, 20), packed(model.encode(image))]

    def their_encodings(model, image):  # ours normalises inside, theirs leaves it to the pipeline
        posterior = model.encode(image).latent_dist
        mean, std = statistics(model)
        return [posterior.mean, posterior.logvar, (packed(posterior.mean) - mean) / std]

    def their_image(model, latents):
        mean, std = statistics(model)
        return model.decode(unpacked(packed(latents) * std + mean)).sample

    exact = Exact(lambda: their_encodings(reference, image.double()), worst_error)
    exact.check(their_encodings(theirs, image), torch.float32)
    exact.check(our_encodings(ours, image), torch.float32)
    latents = ours.encode(image)
    exact_image = Exact(lambda: their_image(reference, latents.double()))
    exact_image.check(their_image(theirs, latents), torch.float32)
    exact_image.check(ours.decode(latents), torch.float32)
    ours.double()
    exact.check(our_encodings(ours, image.double()), torch.float64)
    exact_image.check(ours.decode(latents.double()), torch.float64)
    assert relative_error(ours.denormalise(ours.normalise(latents.double())), latents) < 1e-12


@torch.no_grad()
def test_samples_of_the_posterior_and_fixed_statistics():
    """The noise is the one that theirs draws, and the statistics are those of the weights, in training too."""
    config = Flux2AutoEncoderConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, norm_groups=4)
    ours = autoencoder(config, 0)
    theirs = diffusers_autoencoder(config, {n: t.clone() for n, t in ours.state_dict().items()})
    image = normal((2, 3, 12, 16), 1)
    mean, std = statistics(theirs)
    sample = theirs.encode(image).latent_dist.sample(torch.Generator().manual_seed(5))
    expected = (packed(sample) - mean) / std
    assert relative_error(packed(ours.encode(image, torch.Generator().manual_seed(5))), expected) < 2e-6
    before = ours.encode(image)
    ours.train()
    assert torch.equal(ours.encode(image), before)
    assert torch.equal(ours.bn.running_mean, theirs.bn.running_mean)


# --- counts and layouts ---------------------------------------------------------------------------

COUNTS = {  # parameters, tensors in the official layout, tensors in diffusers'
    "dev": (32_223_281_152, 299, 331),
    "klein-4b": (3_875_544_576, 149, 169),
    "klein-9b": (9_078_581_248, 201, 233),
}


@pytest.mark.parametrize("name", FLUX2_VARIANTS)
def test_counts_and_names_of_the_official_sizes(name):
    config = Flux2Config.variant(name)
    with torch.device("meta"):
        ours = Flux2(config).state_dict()
        theirs = Flux2Transformer2DModel.from_config(to_diffusers_config(config)).state_dict()
        converted = convert_flux2_transformer_checkpoint_to_diffusers(dict(ours))
    assert (sum(t.numel() for t in ours.values()), len(ours), len(theirs)) == COUNTS[name]
    expected = {n: tuple(t.shape) for n, t in theirs.items()}
    assert {n: tuple(t.shape) for n, t in converted.items()} == expected
    assert shapes(config, "diffusers") == expected
    assert infer_config(ours) == config == infer_config(theirs)
    assert from_diffusers_config(to_diffusers_config(config)) == config
    assert config.guidance_embed == (name == "dev") == any("guidance" in n for n in ours)


def test_counts_of_the_autoencoder():
    with torch.device("meta"):
        ours, theirs = Flux2AutoEncoder().state_dict(), AutoencoderKLFlux2().state_dict()
    assert len(ours) == len(theirs) == 251
    parameters = sum(t.numel() for n, t in ours.items() if not n.startswith("bn."))
    assert parameters == 84_046_115
    assert shapes(Flux2AutoEncoderConfig(), "diffusers") == {n: tuple(t.shape) for n, t in theirs.items()}
    assert infer_config(theirs) == Flux2AutoEncoderConfig() == infer_config(ours)
    with torch.device("meta"):
        built = AutoencoderKLFlux2.from_config(to_diffusers_config(Flux2AutoEncoderConfig()))
    assert from_diffusers_config(dict(built.config)) == Flux2AutoEncoderConfig()


@examples(20)
@given(cases())
def test_our_converter_and_theirs_agree(case):
    ours = case.model().state_dict()
    theirs = convert(ours, to="diffusers", config=case.config)
    expected = convert_flux2_transformer_checkpoint_to_diffusers(dict(ours))
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[n], expected[n]) for n in expected)
    back = convert(theirs, to="bfl", config=case.config)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[n], ours[n]) for n in ours)


def test_our_converter_and_theirs_agree_on_the_autoencoder():
    config = Flux2AutoEncoderConfig(ch=8, ch_mult=(1, 2, 1), num_res_blocks=1, z_channels=4, norm_groups=4)
    ours = autoencoder(config, 0).state_dict()
    theirs = convert(ours, to="diffusers", config=config)
    expected = autoencoder_to_diffusers(ours, config)
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[n], expected[n]) for n in expected)
    back = convert(theirs, to="bfl", config=config)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[n], ours[n]) and back[n].dtype == ours[n].dtype for n in ours)
