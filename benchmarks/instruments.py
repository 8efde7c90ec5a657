"""The cost of sites: with nothing recorded, and with attention maps recorded, also beside diffusers."""

from __future__ import annotations

import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

import fluxedu as fe
from benchmarks.speed import diffusers_inputs, diffusers_model, random_inputs, time_alternately, velocity_step
from fluxedu import probe
from fluxedu.attention_map import AttentionMap
from fluxedu.memory.placement import PeakBytes
from fluxedu.models import Flux, FluxConfig
from fluxedu.models.blocks import DoubleStreamBlock

WORDS = 20  # text tokens whose maps are recorded


# ---------------------------------------------------------------- nothing recorded


class CallCounter:
    """A watcher that counts the calls of ``probe`` and ``is_watched``, and changes nothing."""

    def __init__(self):
        self.calls = 0

    def __call__(self, owner: probe.Sited, name: str, value: object) -> object:
        self.calls += 1
        return value

    def wants(self, owner: probe.Sited, name: str) -> bool:
        self.calls += 1
        return False


@torch.no_grad()
def idle_sites(config: FluxConfig, side: int, txt_len: int, rounds: int) -> dict:
    """What sites cost while nothing is watched: calls per step x time per call, as a share of the step without them.

    Timing a step with and without sites would measure noise, because the difference is far below it. Counting and
    timing the calls on their own resolves it. On a GPU it is an upper bound, since the calls overlap with running
    kernels.
    """
    flux = Flux(config).eval()
    step = velocity_step(flux, random_inputs(config, side, txt_len))
    counter = CallCounter()
    previous = probe.watch(counter)
    try:
        step()
    finally:
        probe.watch(previous)
    names = {"block": flux.double_blocks[0], "value": torch.zeros(1)}
    per_call = min(timeit.repeat('block.probe("img", value)', globals=names, number=100_000, repeat=5)) / 100_000
    seconds, _ = time_alternately(step, lambda: None, rounds)
    cost = counter.calls * per_call
    return {"calls": counter.calls, "call_s": per_call, "step_s": seconds, "ratio": seconds / (seconds - cost)}


# ---------------------------------------------------------------- recording


@torch.no_grad()
def word_maps(config: FluxConfig, side: int, txt_len: int, rounds: int) -> dict:
    """A step that records in every block how much the image attends to 20 words: mean over heads, in 16 bits."""
    flux = Flux(config).eval()
    step = velocity_step(flux, random_inputs(config, side, txt_len))
    sizes: list[int] = []

    def recorded() -> None:
        with fe.record("*.attn.map", tokens=list(range(WORDS)), reduce="head-mean", dtype=torch.float16) as rec:
            step()
        sizes.append(rec.nbytes)

    recording, plain = time_alternately(recorded, step, rounds)
    least = (config.depth + config.depth_single_blocks) * side * side * WORDS * 2
    ratio = recording / plain
    return {"recorded_s": recording, "plain_s": plain, "ratio": ratio, "bytes": sizes[-1], "least_bytes": least}


@torch.no_grad()
def whole_map(config: FluxConfig, side: int, txt_len: int, rounds: int) -> dict:
    """The whole attention map of one block from a recorder, beside the same formula written out by hand."""
    g = torch.Generator().manual_seed(0)
    shape = (1, config.num_heads, side * side + txt_len, config.head_dim)
    q, k, v = (torch.randn(shape, generator=g) for _ in range(3))
    block = DoubleStreamBlock(config)
    block.site_path = "double.0"
    result: list[Tensor] = []  # keeps the map alive, as a user would

    def recorded() -> None:
        with fe.record("double.0.attn.map") as rec:
            block.probe("attn.map", AttentionMap(q, k, v, txt_len))
        result[:] = [rec["double.0.attn.map"].tensor[0]]

    def by_hand() -> None:
        result[:] = [(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)[0].clone()]

    ours, hand = time_alternately(recorded, by_hand, rounds)
    return {"recorded_s": ours, "by_hand_s": hand, "ratio": ours / hand}


@contextmanager
def diffusers_word_maps(maps: list[Tensor], txt_len: int) -> Iterator[None]:
    """Make diffusers' attention compute the whole map, and append to ``maps`` what :func:`word_maps` records of it."""
    from diffusers.models.transformers import transformer_flux

    def attend(q: Tensor, k: Tensor, v: Tensor, **_) -> Tensor:  # [B, N, H, d]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        maps.append(weights[:, :, txt_len:, :WORDS].mean(1).half())
        return (weights @ v).transpose(1, 2)

    with mock.patch.object(transformer_flux, "dispatch_attention_fn", attend):
        yield


@torch.no_grad()
def word_maps_beside_diffusers(config: FluxConfig, side: int, txt_len: int, rounds: int) -> dict:
    """Time and peak memory of the same word maps, from our recorder and from diffusers."""
    flux = Flux(config).eval()
    x, reference = random_inputs(config, side, txt_len), diffusers_model(flux)
    inputs = diffusers_inputs(x)
    result: list[object] = []  # keeps the maps alive, as a user would

    def ours() -> None:
        with fe.record("*.attn.map", tokens=list(range(WORDS)), reduce="head-mean", dtype=torch.float16) as rec:
            flux(**x)
        result[:] = [rec]

    def theirs() -> None:
        maps: list[Tensor] = []
        with diffusers_word_maps(maps, txt_len):
            reference(**inputs)
        result[:] = maps

    seconds, their_seconds = time_alternately(ours, theirs, rounds)
    peaks = []
    for run in (ours, theirs):
        result.clear()
        with PeakBytes() as memory:
            run()
        peaks.append(memory.peak)
    return {
        "ours_s": seconds, "diffusers_s": their_seconds, "ratio": seconds / their_seconds,
        "ours_bytes": peaks[0], "diffusers_bytes": peaks[1], "memory_ratio": peaks[0] / peaks[1],
    }  # fmt: skip


# ---------------------------------------------------------------- many interventions


def head_ablations(rounds: int, steps: int = 8) -> dict:
    """The 40 heads of the miniature ablated with :func:`fluxedu.ablate_each`, beside one run for each head."""
    pipe, prompt = fe.load("nano"), "a red circle left of a blue square"
    options = {"seed": 4, "steps": steps, "trajectory": False, "progress": False}
    blocks = [f"double.{i}" for i in range(2)] + [f"single.{i}" for i in range(6)]

    def ablations() -> list[fe.intervene]:
        return [fe.ablate(f"{block}.heads", heads=[head]) for block in blocks for head in range(5)]

    def one_by_one() -> None:
        for ablation in ablations():
            with ablation:
                pipe(prompt, **options)

    each, single = time_alternately(lambda: fe.ablate_each(pipe, ablations(), prompt, **options), one_by_one, rounds)
    return {"each_s": each, "one_by_one_s": single, "ratio": each / single}
