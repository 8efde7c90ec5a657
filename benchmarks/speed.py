"""Speed and memory of one step, of a whole image and of training, beside diffusers."""

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


# ---------------------------------------------------------------- timing and input


def synchronise(device: torch.device | str | None = None) -> None:
    """Wait for the kernels that a GPU has still to run; on other devices there are none."""
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_alternately(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int, device: torch.device | str | None = None
) -> tuple[float, float]:
    """Median seconds of both, run alternately after one warm-up round."""
    ours(), theirs()
    synchronise(device)
    times: dict[Callable, list[float]] = {ours: [], theirs: []}
    for _ in range(rounds):
        for run in (ours, theirs):
            start = time.perf_counter()
            run()
            synchronise(device)
            times[run].append(time.perf_counter() - start)
    return statistics.median(times[ours]), statistics.median(times[theirs])


def random_inputs(
    config: FluxConfig,
    side: int,
    txt_len: int,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random inputs of :meth:`Flux.forward` with ``side x side`` image tokens and ``txt_len`` text tokens."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=g).to(device, dtype)

    return {
        "img": draw(side * side, config.in_channels),
        "img_ids": image_ids(2 * side, 2 * side).to(device),
        "txt": draw(txt_len, config.context_in_dim),
        "txt_ids": text_ids(txt_len).to(device),
        "timesteps": torch.full((batch,), 0.6, device=device),
        "y": draw(config.vec_in_dim),
        "guidance": torch.full((batch,), 3.5, device=device),
    }


def velocity_step(flux: Flux, x: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One step of a run as the pipeline computes it, with RoPE and modulations planned before."""
    rope = flux.rope(x["img_ids"], x["txt_ids"])
    plan = flux.plan(torch.linspace(1, 0.05, STEPS, device=x["img"].device)[:, None], x["guidance"], x["y"])[3]
    return lambda: flux.velocity(x["img"], x["txt"], rope, plan)


def diffusers_model(flux: Flux):
    """diffusers' transformer with the same weights."""
    from diffusers import FluxTransformer2DModel

    config = to_diffusers_config(flux.config)
    with meta_init():
        model = FluxTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    model.load_state_dict(convert(flux.state_dict(), to="diffusers", config=flux.config), assign=True)
    return model.eval()


def diffusers_inputs(x: dict[str, Tensor]) -> dict:
    """The same inputs under diffusers' names."""
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


# ---------------------------------------------------------------- beside diffusers


@torch.no_grad()
def step_ratio(config: FluxConfig, side: int, txt_len: int, rounds: int) -> dict:
    """One step of a run of 20, including its share of the plan, beside diffusers' forward; and plain forwards."""
    torch.manual_seed(0)
    flux = Flux(config).eval()
    reference, x = diffusers_model(flux), random_inputs(config, side, txt_len)
    inputs = diffusers_inputs(x)
    times = torch.linspace(1, 0.05, STEPS)[:, None]
    step, theirs = time_alternately(velocity_step(flux, x), lambda: reference(**inputs), rounds)
    planning, forward = time_alternately(lambda: flux.plan(times, x["guidance"], x["y"]), lambda: flux(**x), rounds)
    ours = step + planning / STEPS
    return {"ours_s": ours, "diffusers_s": theirs, "ratio": ours / theirs, "plain_forward_ratio": forward / theirs}


@torch.no_grad()
def image_ratio(rounds: int, images: int = 1) -> dict:
    """Prompts to images on the miniature in 20 steps, beside diffusers' pipeline opened from the same folder.

    Both get all prompts in one call; the seconds are those of one image.
    """
    from diffusers import FluxPipeline as Reference

    from fluxedu.loading import WEIGHTS, load

    pipe, reference = load("nano"), Reference.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    colors = ("red", "blue", "green", "yellow")
    pairs = [(one, other) for one in colors for other in colors][:images]
    prompts = [f"a {one} circle left of a {other} square on a white background" for one, other in pairs]
    ours, theirs = time_alternately(
        lambda: pipe(prompts, steps=STEPS, trajectory=False, progress=False),
        lambda: reference(prompts, num_inference_steps=STEPS, height=128, width=128, max_sequence_length=32),
        rounds,
    )
    return {"ours_s": ours / images, "diffusers_s": theirs / images, "ratio": ours / theirs}


@torch.no_grad()
def memory_ratio(config: FluxConfig, side: int, txt_len: int) -> dict:
    """The largest number of bytes that one plain forward holds in tensors, beyond weights and inputs."""
    flux = Flux(config).eval()
    x, peaks = random_inputs(config, side, txt_len), []
    for model, inputs in ((flux, x), (diffusers_model(flux), diffusers_inputs(x))):
        with PeakBytes() as memory:
            model(**inputs)
        peaks.append(memory.peak)
    return {"ours_bytes": peaks[0], "diffusers_bytes": peaks[1], "ratio": peaks[0] / peaks[1]}


# ---------------------------------------------------------------- training


def matmul_peak(dtype: torch.dtype, size: int = 1536, rounds: int = 8, device: torch.device | str = "cpu") -> float:
    """The fastest matrix product on this device, in FLOP per second."""
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    a @ b
    synchronise(device)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def training_speed(rounds: int) -> dict:
    """Training samples and steps per second of the flow, and the share of the matmul peak that this is."""
    from fluxedu.nano import networks
    from training.flow import RECIPE, AlignedFlow, initialise
    from training.loop import matmul_dtype, mixed_precision

    torch.manual_seed(0)
    model, side, batch = AlignedFlow(initialise(Flux(networks.FLUX))), 8, RECIPE.batch
    x = random_inputs(networks.FLUX, side, networks.TEXT_LENGTH)
    x = {k: v if "ids" in k else v.expand(batch, *v.shape[1:]).contiguous() for k, v in x.items()}

    def step() -> None:
        with mixed_precision():
            velocity, logits = model(*x.values())
        (velocity.float().square().mean() + logits.float().square().mean()).backward()
        model.zero_grad(set_to_none=True)

    seconds, _ = time_alternately(step, lambda: None, max(3, rounds // 3))
    # weights that multiply one token, averaged over both streams; modulation is computed once per image, not per token
    weights = sum(p.numel() / 2 for n, p in model.flux.double_blocks.named_parameters() if "mod" not in n)
    weights += sum(p.numel() for n, p in model.flux.single_blocks.named_parameters() if "modulation" not in n)
    flop = 6 * batch * weights * (side * side + networks.TEXT_LENGTH)
    dtype = matmul_dtype()
    return {
        "samples_per_second": batch / seconds,
        "steps_per_second": 1 / seconds,
        "dtype": str(dtype).removeprefix("torch."),
        "share_of_matmul_peak": flop / seconds / matmul_peak(dtype),
    }
