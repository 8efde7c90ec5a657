"""What looking costs: nobody looking, word maps of everything, a whole map, and diffusers made to do the same."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

import fluxedu as fe
from benchmarks.speed import STEPS, PeakBytes, asked_of, in_turns, inputs_of, reference_of
from fluxedu.models import Flux, FluxConfig, attention, blocks, modulation
from fluxedu.models import flux as flux_module
from fluxedu.models.attention_map import AttentionMap

WORDS = 20  # tokens of a prompt that are looked at
MODULES = (attention, modulation, blocks, flux_module)  # each imports from those before it


# ---------------------------------------------------------------- the same code without its sites


class _WithoutSites(ast.NodeTransformer):
    """``x.probe("name", value)`` and ``seen("name", value)`` become ``value``, ``x.is_watched("name")`` becomes False."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        if called in ("probe", "seen") and len(node.args) == 2:
            return node.args[1]
        return ast.Constant(False) if called == "wanted" else node


def without_sites() -> type[Flux]:
    """The transformer built from the same source with every site taken out."""
    made: dict[str, ModuleType] = {}
    with mock.patch.dict(sys.modules):
        for module in MODULES:
            bare = ModuleType(module.__name__)
            bare.__file__ = module.__file__
            tree = ast.fix_missing_locations(_WithoutSites().visit(ast.parse(inspect.getsource(module))))
            sys.modules[module.__name__] = made[module.__name__] = bare
            exec(compile(tree, module.__file__, "exec"), bare.__dict__)
    return made[transformer.__name__].Flux


def a_step(flux: Flux, x: dict[str, Tensor]):
    """One step of a run, as the sampler asks for it."""
    rope = flux.rope(x["img_ids"], x["txt_ids"])
    plan = flux.plan(torch.linspace(1, 0.05, STEPS, device=x["img"].device)[:, None], x["guidance"], x["y"])[3]
    return lambda: flux.velocity(x["img"], x["txt"], rope, plan)


@torch.no_grad()
def idle(config: FluxConfig, side: int, text: int, rounds: int) -> dict:
    """A step with its sites, nobody looking, beside a step of the code without them."""
    flux = Flux(config).eval()
    bare = without_sites()(config).eval()
    bare.load_state_dict(flux.state_dict())
    x = inputs_of(config, side, text)
    ours, theirs = a_step(flux, x), a_step(bare, x)
    assert torch.equal(ours(), theirs())
    with_them, without = in_turns(ours, theirs, rounds)
    return {"with_sites_s": with_them, "without_s": without, "ratio": with_them / without}


# ---------------------------------------------------------------- recording


@torch.no_grad()
def word_maps(config: FluxConfig, side: int, text: int, rounds: int) -> dict:
    """A step that keeps what the image takes from 20 words, of every block, the mean over heads, in 16 bits."""
    flux = Flux(config).eval()
    step = a_step(flux, inputs_of(config, side, text))
    kept: list[int] = []

    def recorded() -> None:
        with fe.record("*.attn.map", tokens=list(range(WORDS)), reduce="head-mean", dtype=torch.float16) as rec:
            step()
        kept.append(rec.nbytes)

    looking, plain = in_turns(recorded, step, rounds)
    smallest = (config.depth + config.depth_single_blocks) * side * side * WORDS * 2
    return {
        "recorded_s": looking,
        "plain_s": plain,
        "ratio": looking / plain,
        "bytes": kept[-1],
        "least_bytes": smallest,
    }


@torch.no_grad()
def whole_map(config: FluxConfig, side: int, text: int, rounds: int) -> dict:
    """The whole map of one block through a recorder, beside the same formula written out by hand."""
    g = torch.Generator().manual_seed(0)
    shape = (1, config.num_heads, side * side + text, config.head_dim)
    q, k, v = (torch.randn(shape, generator=g) for _ in range(3))
    block = blocks.DoubleStreamBlock(config)
    block.site_path = "double.0"
    kept: list[Tensor] = []

    def recorded() -> None:
        with fe.record("double.0.attn.map") as rec:
            block.probe("attn.map", AttentionMap(q, k, v, text))
        kept[:] = [rec["double.0.attn.map"].tensor[0]]

    def by_hand() -> None:
        kept[:] = [(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)[0].clone()]

    ours, hand = in_turns(recorded, by_hand, rounds)
    return {"recorded_s": ours, "by_hand_s": hand, "ratio": ours / hand}


@contextmanager
def materialised(kept: list[Tensor], text: int) -> Iterator[None]:
    """Let diffusers' processors compute attention as a map, and keep of it what :func:`word_maps` keeps."""
    from diffusers.models.transformers import transformer_flux

    def attend(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:  # [B, N, H, d]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        kept.append(weights[:, :, text:, :WORDS].mean(1).half())
        return (weights @ v).transpose(1, 2)

    with mock.patch.object(transformer_flux, "dispatch_attention_fn", attend):
        yield


@torch.no_grad()
def beside_diffusers(config: FluxConfig, side: int, text: int, rounds: int) -> dict:
    """The same word maps, ours and from processors that make the map: time and peak memory."""
    flux = Flux(config).eval()
    x, reference, kept = inputs_of(config, side, text), reference_of(flux), []
    asked = asked_of(x)

    def ours() -> None:
        with fe.record("*.attn.map", tokens=list(range(WORDS)), reduce="head-mean", dtype=torch.float16) as rec:
            flux(**x)
        kept[:] = [rec]

    def theirs() -> None:
        maps: list[Tensor] = []
        with materialised(maps, text):
            reference(**asked)
        kept[:] = maps

    seconds, their_seconds = in_turns(ours, theirs, rounds)
    peaks = []
    for side_of in (ours, theirs):
        kept.clear()
        with PeakBytes() as held:
            side_of()
        peaks.append(held.peak)
    return {
        "ours_s": seconds, "diffusers_s": their_seconds, "ratio": seconds / their_seconds,
        "ours_bytes": peaks[0], "diffusers_bytes": peaks[1], "memory_ratio": peaks[0] / peaks[1],
    }  # fmt: skip
