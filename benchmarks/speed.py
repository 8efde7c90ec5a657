"""Speed and memory of a step, of a whole picture and of training, beside diffusers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fluxedu.checkpoints import convert, to_diffusers_config
from fluxedu.memory.placement import PeakBytes
from fluxedu.models import Flux, FluxConfig
from fluxedu.models.meta_init import meta_init
from fluxedu.sampling.latents import image_ids, text_ids

WIDE = FluxConfig(hidden_size=1024, num_heads=8, depth=4, depth_single_blocks=8, context_in_dim=1024, vec_in_dim=768)
STEPS = 20


def settled(device: torch.device | str | None = None) -> None:
    """Wait until a GPU has done what it was asked; anything else has."""
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int, device: torch.device | str | None = None
) -> tuple[float, float]:
    """Median seconds of both, run alternately after one round of warming up."""
    ours(), theirs()
    settled(device)
    times: dict[Callable, list[float]] = {ours: [], theirs: []}
    for _ in range(rounds):
        for side in (ours, theirs):
            start = time.perf_counter()
            side()
            settled(device)
            times[side].append(time.perf_counter() - start)
    return statistics.median(times[ours]), statistics.median(times[theirs])


def inputs_of(
    config: FluxConfig,
    side: int,
    text: int,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random input for ``side x side`` image tokens and ``text`` text tokens."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(batch, *shape, generator=g).to(device, dtype)  # noqa: E731
    return {
        "img": draw(side * side, config.in_channels),
        "img_ids": image_ids(2 * side, 2 * side).to(device),
        "txt": draw(text, config.context_in_dim),
        "txt_ids": text_ids(text).to(device),
        "timesteps": torch.full((batch,), 0.6, device=device),
        "y": draw(config.vec_in_dim),
        "guidance": torch.full((batch,), 3.5, device=device),
    }


def reference_of(flux: Flux):
    """diffusers' transformer with the same weights."""
    from diffusers import FluxTransformer2DModel

    config = to_diffusers_config(flux.config)
    with meta_init():
        reference = FluxTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    reference.load_state_dict(convert(flux.state_dict(), to="diffusers", config=flux.config), assign=True)
    return reference.eval()


def asked_of(x: dict[str, Tensor]) -> dict:
    """The same input under diffusers' names."""
    return {
        "hidden_states": x["img"],
        "img_ids": x["img_ids"],
        "encoder_hidden_states": x["txt"],
        "txt_ids": x["txt_ids"],
        "timestep": x["timesteps"],
        "pooled_projections": x["y"],
        "guidance": x["guidance"],
        "return_dict": False,
    }


@torch.no_grad()
def step_ratio(config: FluxConfig, side: int, text: int, rounds: int) -> dict:
    """One step of a run of 20: ours with its share of the plan, diffusers' as it is; and plain forwards."""
    torch.manual_seed(0)
    flux = Flux(config).eval()
    reference, x = reference_of(flux), inputs_of(config, side, text)
    asked = asked_of(x)
    times = torch.linspace(1, 0.05, STEPS)[:, None]
    rope = flux.rope(x["img_ids"], x["txt_ids"])
    plan = flux.plan(times, x["guidance"], x["y"])
    step, theirs = in_turns(
        lambda: flux.velocity(x["img"], x["txt"], rope, plan[3]), lambda: reference(**asked), rounds
    )
    ahead, forward = in_turns(lambda: flux.plan(times, x["guidance"], x["y"]), lambda: flux(**x), rounds)
    ours = step + ahead / STEPS
    return {"ours_s": ours, "diffusers_s": theirs, "ratio": ours / theirs, "plain_forward_ratio": forward / theirs}


@torch.no_grad()
def picture_ratio(rounds: int) -> dict:
    """Prompt to picture on the miniature, 20 steps, beside diffusers' pipeline opened from the same folder."""
    from diffusers import FluxPipeline as Reference

    from fluxedu.loading import WEIGHTS, load

    pipe, reference = load("nano"), Reference.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    prompt = "a red circle left of a blue square on a white background"
    ours, theirs = in_turns(
        lambda: pipe(prompt, steps=STEPS, progress=False),
        lambda: reference(prompt, num_inference_steps=STEPS, height=128, width=128, max_sequence_length=32),
        rounds,
    )
    return {"ours_s": ours, "diffusers_s": theirs, "ratio": ours / theirs}


@torch.no_grad()
def memory_ratio(config: FluxConfig, side: int, text: int) -> dict:
    """The most bytes of tensors that one plain forward holds at once, beyond weights and input."""
    flux = Flux(config).eval()
    x, peaks = inputs_of(config, side, text), []
    for model, given in ((flux, x), (reference_of(flux), asked_of(x))):
        with PeakBytes() as held:
            model(**given)
        peaks.append(held.peak)
    return {"ours_bytes": peaks[0], "diffusers_bytes": peaks[1], "ratio": peaks[0] / peaks[1]}


def matmul_peak(dtype: torch.dtype, size: int = 1536, rounds: int = 8, device: torch.device | str = "cpu") -> float:
    """The best matrix product of this machine, in FLOP a second."""
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    a @ b
    settled(device)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        settled(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def training_speed(rounds: int) -> dict:
    """Training samples and steps a second of the flow, and the share of the matmul peak they make."""
    from fluxedu.nano import networks
    from training.flow import RECIPE, WithAlignment, initialise
    from training.loop import mixed_precision, product_dtype

    torch.manual_seed(0)
    model, side, batch = WithAlignment(initialise(Flux(networks.FLUX))), 8, RECIPE.batch
    x = inputs_of(networks.FLUX, side, networks.TEXT_LENGTH)
    x = {k: v if "ids" in k else v.expand(batch, *v.shape[1:]).contiguous() for k, v in x.items()}

    def step() -> None:
        with mixed_precision():
            velocity, named = model(*x.values())
        (velocity.float().square().mean() + named.float().square().mean()).backward()
        model.zero_grad(set_to_none=True)

    seconds, _ = in_turns(step, lambda: None, max(3, rounds // 3))
    flop = 6 * batch * _active(model.flux) * (side * side + networks.TEXT_LENGTH)
    dtype = product_dtype()
    return {
        "samples_per_second": batch / seconds,
        "steps_per_second": 1 / seconds,
        "dtype": str(dtype).removeprefix("torch."),
        "share_of_matmul_peak": flop / seconds / matmul_peak(dtype),
    }


def _active(flux: Flux) -> float:
    """Weights that a token meets, on average over streams (modulation is met once a picture, not a token)."""
    token = [p.numel() / 2 for n, p in flux.double_blocks.named_parameters() if "mod" not in n]
    token += [p.numel() for n, p in flux.single_blocks.named_parameters() if "modulation" not in n]
    return sum(token)
