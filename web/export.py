"""Write the page's graphs and their description: ``python -m web.export``, in the root of a checkout.

The graphs (``fluxedu/play/graphs/*.onnx``) hold operations only. The numbers stay in the safetensors files that Python
loads too: ``manifest.json`` beside the graphs says which bytes of which files, in which order, are the weights of each
graph. The page expands them from bfloat16 to float32. Run this after a change of the networks, or of the values that
pass their sites; it needs ``pip install onnx onnxscript``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.checkpoints.layouts import recipes, shapes
from fluxedu.loading import WEIGHTS, load
from fluxedu.models.modulation import TIMESTEP_DIM
from fluxedu.nano.scenes import ASPECTS, BACKGROUNDS, COLORS, render, sample_scene
from fluxedu.nano.vocabulary import VOCABULARY
from fluxedu.play import GRAPHS
from fluxedu.sampling.pipeline import FluxPipeline
from web.graphs import Decoder, Step, Text, factor_sites

FILES = {
    "flux": "transformer/diffusion_pytorch_model.safetensors",
    "ae": "vae/diffusion_pytorch_model.safetensors",
    "clip": "text_encoder/model.safetensors",
    "t5": "text_encoder_2/model.safetensors",
}
#: a graph's constants of at most this size stay in its file
MOST_INLINE_BYTES = 16_384


@dataclass
class Weights:
    """All weights of some graphs as one array of float32: where each tensor begins, and the bytes of the files."""

    name: str
    offsets: dict[str, int] = field(default_factory=dict)  # "flux.img_in.weight" -> bytes
    segments: list[list] = field(default_factory=list)  # [file, first byte, end] of bfloat16 numbers, in order
    bytes: int = 0

    def add(self, network: str, config, prefix: str = "") -> None:
        """Append the tensors of a network whose names begin with ``prefix``."""
        file = FILES[network]
        header, start = _header(WEIGHTS / file)
        layout = "diffusers" if network in ("flux", "ae") else "bfl"
        for name, pieces in recipes(config, layout, "bfl").items():
            if not name.startswith(prefix):
                continue
            self.offsets[f"{network}.{name}"] = self.bytes
            for piece in pieces:
                entry = header[piece.name]
                if entry["dtype"] != "BF16":
                    raise ValueError(f"{file}: {piece.name} must be bfloat16, not {entry['dtype']}.")
                first, end = entry["data_offsets"]
                row = (end - first) // entry["shape"][0]
                self._append(file, start + first + row * piece.start, start + first + row * piece.stop)
            if self.bytes - self.offsets[f"{network}.{name}"] != 4 * math.prod(shapes(config, "bfl")[name]):
                raise ValueError(f"the pieces of {name} have another size than the tensor.")

    def _append(self, file: str, first: int, end: int) -> None:
        if self.segments and self.segments[-1][0] == file and self.segments[-1][2] == first:
            self.segments[-1][2] = end
        else:
            self.segments.append([file, first, end])
        self.bytes += 2 * (end - first)

    def to_json(self) -> dict:
        return {"bytes": self.bytes, "segments": self.segments}


def _header(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file, and the position of its first number."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


# ---------------------------------------------------------------- one graph


def export(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], dynamic: dict, weights: Weights):
    """The ONNX model of a module; its parameters are references into ``weights``."""
    from onnxscript import optimizer

    with torch.no_grad():
        module.eval()(**inputs)
        found = [*outputs, *module.sites]
        program = torch.onnx.export(
            module,
            kwargs=inputs,
            dynamo=True,
            optimize=False,
            verbose=False,
            dynamic_shapes=dynamic,
            input_names=list(inputs),
        )
    # whatever depends on a parameter stays a computation, so that the graph has no copy of a weight
    optimizer.optimize_ir(program.model, should_fold=lambda node: False if _reads_parameter(node) else None)
    model = program.model_proto
    if len(found) != len(model.graph.output):
        raise ValueError(f"{len(model.graph.output)} outputs for {len(found)} names.")
    _rename_outputs(model.graph, found)
    _set_frequencies(model.graph)
    _spell_out_sigmoid(model.graph)
    if isinstance(module, Step):
        _in_float64(model.graph)
    _strip(model)
    _externalise(model.graph, weights)
    return model


def _reads_parameter(node) -> bool:
    return any(value is not None and value.is_initializer() for value in node.inputs)


def _rename_outputs(graph, names: list[str]) -> None:
    """Give the outputs the names of their sites. Two sites may share a value, so each output is an Identity of it."""
    import onnx

    for output, name in zip(graph.output, names, strict=True):
        graph.node.append(onnx.helper.make_node("Identity", [output.name], [f"site:{name}"]))
        output.name = f"site:{name}"


def _set_frequencies(graph) -> None:
    """Give the embedding of times torch's own frequencies: 1000 t times an error in their last bit would be seen."""
    import onnx

    half = TIMESTEP_DIM // 2  # as in timestep_embedding
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half).numpy()
    of = {name: node for node in graph.node for name in node.output}
    for node in [node for node in graph.node if node.op_type == "Exp"]:
        source = of[node.input[0]]  # exp(range(...) * c / half)
        while source.op_type in ("Mul", "Div"):
            source = of.get(source.input[0]) or of[source.input[1]]
        if source.op_type != "Range":
            raise ValueError(f"an Exp of {source.op_type} is not the frequencies of the embedding.")
        graph.initializer.append(onnx.numpy_helper.from_array(frequency, f"frequency:{node.output[0]}"))
        node.op_type, node.input[0] = "Identity", f"frequency:{node.output[0]}"


def _spell_out_sigmoid(graph) -> None:
    """``1 / (1 + exp(-x))`` for every Sigmoid, for which ONNX Runtime has an approximation with ten times the error."""
    import onnx

    nodes = []
    for node in graph.node:
        if node.op_type != "Sigmoid":
            nodes.append(node)
            continue
        [x], [y] = node.input, node.output
        make = onnx.helper.make_node
        nodes += [make("Neg", [x], [f"{y}:neg"]), make("Exp", [f"{y}:neg"], [f"{y}:exp"])]
        nodes += [make("Add", [f"{y}:exp", "one"], [f"{y}:sum"]), make("Reciprocal", [f"{y}:sum"], [y])]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, dtype=np.float32), "one"))
    del graph.node[:]
    graph.node.extend(nodes)


def _in_float64(graph) -> None:
    """Compute the layers of the modulation, the only Gemms, in float64: they are small, and every token uses them.

    In float32, ONNX Runtime multiplies a single vector with three times torch's rounding error.
    """
    import onnx

    nodes, make = [], onnx.helper.make_node
    for node in graph.node:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        [y], wide = node.output, [f"{node.output[0]}:{i}" for i in range(len(node.input))]
        nodes += [make("Cast", [x], [w], to=onnx.TensorProto.DOUBLE) for x, w in zip(node.input, wide, strict=True)]
        node.input[:], node.output[:] = wide, [f"{y}:wide"]
        nodes += [node, make("Cast", [f"{y}:wide"], [y], to=onnx.TensorProto.FLOAT)]
    del graph.node[:]
    graph.node.extend(nodes)


def _strip(model) -> None:
    """Remove what only debuggers read: stack traces, types of intermediate values, long names."""
    del model.metadata_props[:]
    model.doc_string = ""
    del model.graph.value_info[:]
    del model.functions[:]
    short: dict[str, str] = {}
    keep = {x.name for x in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    for i, node in enumerate(model.graph.node):
        del node.metadata_props[:]
        node.doc_string, node.name = "", f"n{i}"
        for names in (node.input, node.output):
            for j, name in enumerate(names):
                if name and name not in keep:
                    names[j] = short.setdefault(name, f"v{len(short)}")
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
        value.doc_string = ""


def _externalise(graph, weights: Weights) -> None:
    """Replace the values of parameters by their place in ``weights``."""
    import onnx

    for tensor in graph.initializer:
        offset = weights.offsets.get(tensor.name)
        if offset is None:
            size = len(tensor.raw_data)
            if size > MOST_INLINE_BYTES:
                raise ValueError(f"{tensor.name} has {size} bytes and is no parameter.")
            continue
        length = 4 * math.prod(tensor.dims)
        if tensor.data_type != onnx.TensorProto.FLOAT:
            raise ValueError(f"{tensor.name} must be float32.")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in (("location", weights.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))


# ---------------------------------------------------------------- all of them


def export_all(pipe: FluxPipeline) -> tuple[dict[str, object], dict[str, Weights], dict[str, nn.Module]]:
    """The graphs by name, their weights, and the modules that they were exported from."""
    config, encoder = pipe.flux.config, pipe.prompt_encoder
    length, patches = encoder.t5_tokenizer.length, 64
    tokens = length + patches

    text = Weights("text")
    text.add("t5", encoder.t5.config)
    text.add("clip", encoder.clip.config)
    flux = Weights("flux")
    flux.add("flux", config)
    ae = Weights("ae")
    ae.add("ae", pipe.autoencoder.config, "decoder.")

    n = torch.export.Dim("n", min=2, max=4096)  # the number of image tokens
    everything = n + length
    step_inputs = {
        "img": torch.randn(1, patches, config.in_channels),
        "txt": torch.randn(1, length, config.context_in_dim),
        "pooled": torch.randn(1, config.vec_in_dim),
        "t": torch.rand(1),
        "guidance": torch.ones(1),
        "cos": torch.randn(tokens, config.head_dim // 2),
        "sin": torch.randn(tokens, config.head_dim // 2),
        "factors": torch.ones(sum(factor_sites(config).values())),
        "key_bias": torch.zeros(tokens),
    }
    step_dims: dict = dict.fromkeys(step_inputs, {})
    step_dims |= {"img": {1: n}, "cos": {0: everything}, "sin": {0: everything}, "key_bias": {0: everything}}
    ids = {"t5_ids": torch.ones(1, length, dtype=torch.long), "clip_ids": torch.ones(1, length, dtype=torch.long)}
    ids["clip_ids"][:, 3:] = encoder.clip.config.eos_token_id
    latent = {"latent": torch.randn(1, pipe.autoencoder.config.z_channels, 16, 18)}
    sides = {2: torch.export.Dim("h", min=4, max=512), 3: torch.export.Dim("w", min=4, max=512)}

    modules = {"text": Text(encoder.t5, encoder.clip), "step": Step(pipe.flux, inside=False)}
    modules |= {"inside": Step(pipe.flux, inside=True), "decoder": Decoder(pipe.autoencoder, inside=False)}
    modules["decoder_inside"] = Decoder(pipe.autoencoder, inside=True)
    models = {
        "text": export(modules["text"], ids, ["txt", "pooled"], {name: {} for name in ids}, text),
        "step": export(modules["step"], step_inputs, ["velocity"], step_dims, flux),
        "inside": export(modules["inside"], step_inputs, ["velocity"], step_dims, flux),
        "decoder": export(modules["decoder"], latent, ["image"], {"latent": sides}, ae),
        "decoder_inside": export(modules["decoder_inside"], latent, ["image"], {"latent": sides}, ae),
    }
    return models, {"text": text, "flux": flux, "ae": ae}, modules


def preview_map(pipe: FluxPipeline, scenes: int = 64) -> dict[str, list]:
    """The linear map from a latent cell to the mean colour of its 8 x 8 pixels that fits best: RGB in [0, 1]."""
    rng, cells, colours = np.random.default_rng(0), [], []
    for _ in range(scenes):
        image = torch.from_numpy(render(sample_scene(rng))).permute(2, 0, 1)[None].float() / 255
        latent = pipe.autoencoder.encode(2 * image - 1)
        cells.append(latent[0].flatten(1).T)
        colours.append(F.avg_pool2d(image, pipe.autoencoder.config.downscale)[0].flatten(1).T)
    inputs = torch.cat([torch.cat(cells), torch.ones(sum(map(len, cells)), 1)], dim=1)
    solution = torch.linalg.lstsq(inputs, torch.cat(colours)).solution
    rounded = [[round(x, 4) for x in row] for row in solution.tolist()]
    return {"matrix": rounded[:-1], "bias": rounded[-1]}


def manifest(pipe: FluxPipeline, weights: dict[str, Weights], modules: dict[str, nn.Module]) -> dict:
    """What the page has to know besides the graphs."""
    config, defaults, encoder = pipe.flux.config, pipe.defaults, pipe.prompt_encoder
    mu = defaults.shift_ends[0]
    return {
        "config": {**config.to_dict(), "head_dim": config.head_dim, "mlp_hidden": config.mlp_hidden},
        "latent": {"channels": pipe.autoencoder.config.z_channels, "downscale": pipe.autoencoder.config.downscale},
        "shapes": [list(shape) for shape in ASPECTS],
        "defaults": {"steps": defaults.steps, "guidance": defaults.guidance, "mu": mu, "shift": math.exp(mu)},
        "txtLen": encoder.t5_tokenizer.length,
        "tokenizers": {
            "t5": _tokenizer(encoder.t5_tokenizer, "tokenizer_2", "</s>", "<pad>"),
            "clip": _tokenizer(encoder.clip_tokenizer, "tokenizer", "<|endoftext|>", "<|endoftext|>"),
        },
        "vocabulary": {kind: list(words) for kind, words in VOCABULARY.items()},
        "colours": {name: list(rgb) for name, rgb in (COLORS | BACKGROUNDS).items()},
        "factors": factor_sites(config),
        "graphs": {
            "text": {"weights": "text", "outputs": ["txt", "pooled", *modules["text"].sites]},
            "step": {"weights": "flux", "outputs": ["velocity"]},
            "inside": {"weights": "flux", "outputs": ["velocity", *modules["inside"].sites]},
            "decoder": {"weights": "ae", "outputs": ["image"]},
            "decoder_inside": {"weights": "ae", "outputs": ["image", *modules["decoder_inside"].sites]},
        },
        "weights": {name: found.to_json() for name, found in weights.items()},
        "preview": preview_map(pipe),
    }


def _tokenizer(tokenizer, folder: str, end: str, pad: str) -> dict:
    return {"folder": folder, "length": tokenizer.length, "end": tokenizer.end_id, "pad": tokenizer.pad_id}


def main() -> None:
    """Write the graphs and the manifest."""
    pipe = load("nano")
    models, weights, modules = export_all(pipe)
    GRAPHS.mkdir(exist_ok=True)
    for name, model in models.items():
        data = model.SerializeToString(deterministic=True)
        (GRAPHS / f"{name}.onnx").write_bytes(data)
        print(
            f"{name}.onnx  {len(data) / 1000:.0f} kB, {len(model.graph.node)} nodes, {len(model.graph.output)} values"
        )
    text = json.dumps(manifest(pipe, weights, modules), separators=(",", ":"))
    (GRAPHS / "manifest.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
