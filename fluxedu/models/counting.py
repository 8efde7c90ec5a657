"""The names and shapes of a transformer's tensors, from its configuration alone. Without PyTorch.

A test compares them with those of :class:`fluxedu.models.flux.Flux` and :class:`fluxedu.models.flux2.Flux2`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from fluxedu.models.config import Flux2Config, FluxConfig

Shape = tuple[int, ...]
TIME_CHANNELS = 256  # of the embedding of a time or a guidance scale


def flux_shapes(config: FluxConfig | Flux2Config) -> dict[str, Shape]:
    """``{"img_in.weight": (3072, 64), ...}``, one entry per tensor."""
    return dict(_tensors(config))


def count_parameters(config: FluxConfig | Flux2Config) -> int:
    return sum(map(math.prod, flux_shapes(config).values()))


def _tensors(c: FluxConfig | Flux2Config) -> Iterator[tuple[str, Shape]]:
    """FLUX.2 has no biases, one modulation for all blocks, gated MLPs, and no pooled vector."""
    is_flux2 = isinstance(c, Flux2Config)
    linear = partial(_linear, bias=not is_flux2)
    d, m = c.hidden_size, c.mlp_hidden
    mlp_in = 2 * m if is_flux2 else m
    yield from linear("img_in", c.in_channels, d)
    yield from linear("txt_in", c.context_in_dim, d)
    embedders = {"time_in": TIME_CHANNELS}
    embedders |= {"guidance_in": TIME_CHANNELS} if c.guidance_embed else {}
    embedders |= {} if is_flux2 else {"vector_in": c.vec_in_dim}
    for name, width in embedders.items():
        yield from linear(f"{name}.in_layer", width, d)
        yield from linear(f"{name}.out_layer", d, d)
    if is_flux2:
        yield from linear("double_stream_modulation_img.lin", d, 6 * d)
        yield from linear("double_stream_modulation_txt.lin", d, 6 * d)
        yield from linear("single_stream_modulation.lin", d, 3 * d)
    for i in range(c.depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            if not is_flux2:
                yield from linear(f"{block}_mod.lin", d, 6 * d)
            yield from _linear(f"{block}_attn.qkv", d, 3 * d, bias=not is_flux2 and c.qkv_bias)
            yield from _norms(f"{block}_attn.norm", c.head_dim)
            yield from linear(f"{block}_attn.proj", d, d)
            yield from linear(f"{block}_mlp.0", d, mlp_in)
            yield from linear(f"{block}_mlp.2", m, d)
    for i in range(c.depth_single_blocks):
        block = f"single_blocks.{i}"
        if not is_flux2:
            yield from linear(f"{block}.modulation.lin", d, 3 * d)
        yield from linear(f"{block}.linear1", d, 3 * d + mlp_in)
        yield from _norms(f"{block}.norm", c.head_dim)
        yield from linear(f"{block}.linear2", d + m, d)
    yield from linear("final_layer.adaLN_modulation.1", d, 2 * d)
    yield from linear("final_layer.linear", d, c.out_channels)


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norms(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.query_norm.scale", (width,)
    yield f"{name}.key_norm.scale", (width,)
