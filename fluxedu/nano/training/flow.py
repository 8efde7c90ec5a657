"""Stages 4 and 5: the flow transformer, and the one with guidance built in.

Rectified flow (arXiv 2209.03003, 2403.03206), t = 1 being noise:

    x_t = (1 - t) * x0 + t * noise,      loss = |model(x_t, t, text) - (noise - x0)|^2

A tenth of the captions is left empty, so that the model can be guided (arXiv 2207.12598). Half way
up, a linear head must name what lies in each patch of the clean picture: the alignment of REPA
(arXiv 2410.06940) with the world's own truth in place of DINO's features. It is dropped afterwards.

The guidance-embedded model learns to predict, in one pass and for any strength g, what the first one
predicts in two (arXiv 2210.03142): ``v_empty + g * (v_text - v_empty)``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.errors import CompileError
from fluxedu.loading import compile_blocks
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.flux import Flux
from fluxedu.models.t5 import T5Encoder
from fluxedu.nano import networks
from fluxedu.nano.scenes import COLORS, FORMS
from fluxedu.nano.training.latents import Latents, Tokens
from fluxedu.nano.training.loop import Recipe, Run, fingerprint, mixed_precision, use_average
from fluxedu.sampling.latents import image_ids, pack, text_ids

RECIPE = Recipe(steps=17500, lr=2e-3, batch=64, warmup=200, decay=0.35, ema=0.998, muon=True)
DISTILL = Recipe(steps=1300, lr=1e-3, batch=32, warmup=100, decay=0.5, ema=0.995, muon=True)
SEED = 55
DROPOUT = 0.1
#: the logit of the time is normal with this mean and spread: mostly noise, since so few and so plain tokens
#: show where things are through a lot of it, and where things are is what is hard to learn
NOISY = (0.9, 1.2)
ALIGN = 0.15  # weight of the alignment
ALIGNED = 0.85  # share of the run that is aligned; to the end it would hold the flow back (arXiv 2505.16792)
GUIDANCE = (1.0, 6.0)  # strengths the embedded guidance is trained on


def initialise(flux: Flux) -> Flux:
    """AdaLN-Zero: every modulation and the last layer begin at zero, so every block begins as identity."""
    for name, p in flux.named_parameters():
        if "mod.lin" in name or "modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(p)
    return flux


class WithAlignment(nn.Module):
    """The flow, and the head that reads the image tokens half way up the single-stream blocks."""

    def __init__(self, flux: Flux):
        super().__init__()
        self.flux, config = flux, flux.config
        self.read_head = nn.Linear(config.hidden_size, len(COLORS) + 1 + len(FORMS) + 1)
        half = self.flux.single_blocks[config.depth_single_blocks // 2 - 1]
        half.register_forward_hook(lambda module, given, out: setattr(self, "half", out))

    def forward(self, *args) -> tuple[Tensor, Tensor]:
        velocity = self.flux(*args)
        return velocity, self.read_head(self.half[:, -velocity.shape[1] :])


def faster(flux: Flux) -> None:
    """Let torch.compile fuse the blocks, a fifth faster to train, where it works: it needs a C++ compiler."""
    try:
        compile_blocks(flux, dynamic=True)
    except CompileError as error:
        print(f"{error} Training without it.")


class Texts:
    """The frozen encoders: ids -> (T5 tokens, pooled vector)."""

    def __init__(self, t5: T5Encoder, clip: CLIPTextEncoder):
        self.t5, self.clip = t5, clip
        self.empty_t5, self.empty_clip = Tokens()([""])

    @torch.no_grad()
    def __call__(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.t5(t5_ids), self.clip(clip_ids)[1]

    def dropped(self, batch: dict[str, Tensor], share: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Encode the captions, a random share of them replaced by the empty one."""
        drop = torch.rand(len(batch["t5"]), 1, generator=g) < share
        return self(torch.where(drop, self.empty_t5, batch["t5"]), torch.where(drop, self.empty_clip, batch["clip"]))


def noisy(x0: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A random time for each picture ``[B, N, 64]`` (logit-normal): ``x_t``, ``t``, the true velocity."""
    t = torch.sigmoid(NOISY[0] + NOISY[1] * torch.randn(len(x0), generator=g))
    noise = torch.randn(x0.shape, generator=g)
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
    return x_t, t, noise - x0


def places(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Ids of a latent's tokens, and of the words beside them."""
    return image_ids(rows, columns), text_ids(networks.TEXT_LENGTH)


def strengths(count: int, between: tuple[float, float], g: torch.Generator) -> Tensor:
    """A strength of guidance for each picture, any between two as likely as another."""
    return between[0] + (between[1] - between[0]) * torch.rand(count, generator=g)


def misnamed(read: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of colour and form of each patch: ``read [B, N, C]`` against ``labels [B, 2, N]``."""
    color, form = read.float().split([len(COLORS) + 1, len(FORMS) + 1], dim=-1)
    return F.cross_entropy(color.transpose(1, 2), labels[:, 0]) + F.cross_entropy(form.transpose(1, 2), labels[:, 1])


def flow_loss(model: WithAlignment, batch: dict[str, Tensor], texts: Texts, g: torch.Generator, align: float = ALIGN):
    """The rectified-flow loss and the alignment, in bfloat16 where it is safe and fast."""
    x_t, t, target = noisy(pack(batch["latents"]), g)
    img_ids, txt_ids = places(*batch["latents"].shape[-2:])
    with mixed_precision():
        txt, pooled = texts.dropped(batch, DROPOUT, g)
        velocity, read = model(x_t, img_ids, txt.float(), txt_ids, t, pooled.float())
    flow = F.mse_loss(velocity.float(), target)
    named = misnamed(read, batch["labels"].flatten(2))
    return flow + align * named, {"flow": float(flow.detach()), "named": float(named.detach())}


Report = Callable[[Flux, int], object]


def train(
    folder: Path, t5: T5Encoder, clip: CLIPTextEncoder, report: Report, made_from: str, resume: bool = True
) -> Flux:
    """Train (or take the finished) flow on the latents in ``folder``; ``report(flux, step)`` now and then."""
    torch.manual_seed(SEED)
    model = WithAlignment(initialise(Flux(networks.FLUX)))
    texts, data = Texts(t5, clip), Latents(folder)
    run = Run("flow", model, RECIPE, folder, resume, f"{made_from}, {len(data.shards)} shards")
    faster(model.flux)

    def loss(step: int):
        align = ALIGN if step < ALIGNED * RECIPE.steps else 0.0
        batch = data.batch(step, RECIPE.batch, SEED)
        return flow_loss(model, batch, texts, torch.Generator().manual_seed(step), align)

    run.train(loss, lambda run: report(flow_of(run), run.step), every=500)
    return flow_of(run)


def flow_of(run: Run) -> Flux:
    """The averaged flow of a run, without its head."""
    weights = {k[len("flux.") :]: v for k, v in run.average.items() if k.startswith("flux.")}
    return use_average(Flux(run.model.flux.config), weights)


# ---------------------------------------------------------------- guidance built in


def student_of(teacher: Flux) -> Flux:
    """The teacher with a guidance input that says nothing yet."""
    student = Flux(teacher.config.with_(guidance_embed=True))
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert all(k.startswith("guidance_in") for k in missing) and not unexpected
    nn.init.zeros_(student.guidance_in.out_layer.weight)
    nn.init.zeros_(student.guidance_in.out_layer.bias)
    return student.train().requires_grad_(True)


def distillation_loss(student: Flux, teacher: Flux, batch: dict[str, Tensor], texts: Texts, g: torch.Generator):
    """How far one guided pass of the student is from two passes of the teacher."""
    x_t, t, _ = noisy(pack(batch["latents"]), g)
    img_ids, txt_ids = places(*batch["latents"].shape[-2:])
    strength = strengths(len(t), GUIDANCE, g)
    with mixed_precision():
        txt, pooled = texts(batch["t5"], batch["clip"])
        no_txt, no_pooled = (x.expand(len(t), *x.shape[1:]) for x in texts(texts.empty_t5, texts.empty_clip))
        with torch.no_grad():
            said = torch.cat([no_txt, txt]), torch.cat([no_pooled, pooled])
            both = teacher(x_t.repeat(2, 1, 1), img_ids, said[0], txt_ids, t.repeat(2), said[1])
        empty, prompted = both.float().chunk(2)
        target = empty + strength[:, None, None] * (prompted - empty)
        velocity = student(x_t, img_ids, txt, txt_ids, t, pooled, strength)
    value = F.mse_loss(velocity.float(), target)
    return value, {"relative": float(value.detach().sqrt() / target.square().mean().sqrt())}


def distill(
    folder: Path, teacher: Flux, t5: T5Encoder, clip: CLIPTextEncoder, report: Report, resume: bool = True
) -> Flux:
    """Train (or take the finished) guidance-embedded model from the first one."""
    torch.manual_seed(SEED + 1)
    student, texts, data = student_of(teacher), Texts(t5, clip), Latents(folder)
    run = Run("flow-dev", student, DISTILL, folder, resume, fingerprint(teacher))
    faster(student)

    def loss(step: int):
        batch = data.batch(step, DISTILL.batch, SEED + 1)
        return distillation_loss(student, teacher, batch, texts, torch.Generator().manual_seed(step))

    now = lambda run: use_average(Flux(student.config), run.average)  # noqa: E731
    run.train(loss, lambda run: report(now(run), run.step), every=500)
    return now(run)
