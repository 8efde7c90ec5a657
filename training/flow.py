"""Stages 4 and 5: the flow transformer, and its distilled version with guidance as an input.

Rectified flow (arXiv 2209.03003, 2403.03206), where t = 1 is noise:

    x_t = (1 - t) * x0 + t * noise,      loss = |model(x_t, t, text) - (noise - x0)|^2

A tenth of the captions is replaced by the empty one, so that classifier-free guidance is possible (arXiv 2207.12598).
Half way through the single-stream blocks, a linear head predicts the object in each patch of the clean image. This is
the alignment of REPA (arXiv 2410.06940) with true labels in place of DINO features. The head is dropped afterwards.

The distilled model learns to predict in one evaluation, for any guidance scale g, what the first one needs two for
(arXiv 2210.03142): ``v_empty + g * (v_text - v_empty)``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.errors import CompileError
from fluxedu.memory.compiled import compile_blocks
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.flux import Flux
from fluxedu.models.t5 import T5Encoder
from fluxedu.nano import networks
from fluxedu.nano.scenes import COLORS, FORMS
from fluxedu.sampling.latents import image_ids, pack, text_ids
from training.data import Latents, Tokens
from training.files import fingerprint
from training.loop import Recipe, Run, load_average, mixed_precision

RECIPE = Recipe(steps=17500, lr=2e-3, batch=64, warmup=200, decay=0.35, ema=0.998, muon=True)
DISTILL_RECIPE = Recipe(steps=1300, lr=1e-3, batch=32, warmup=100, decay=0.5, ema=0.995, muon=True)
SEED = 55
CAPTION_DROPOUT = 0.1
#: Mean and standard deviation of logit(t), shifted towards noise. A few plain tokens show where the objects are even
#: through much noise, and where the objects are is what is hard to learn.
LOGIT_NORMAL = (0.9, 1.2)
ALIGN_WEIGHT = 0.15
ALIGN_SHARE = 0.85  # share of the run with alignment; kept to the end, it would hold the flow back (arXiv 2505.16792)
GUIDANCE = (1.0, 6.0)  # range of guidance scales that the distilled model is trained on
PATCH_CLASSES = (len(COLORS) + 1, len(FORMS) + 1)  # of colour and form; class 0 is the background


def initialise(flux: Flux) -> Flux:
    """AdaLN-Zero: modulations and the last layer start at zero, so every block starts as the identity."""
    for name, p in flux.named_parameters():
        if "mod.lin" in name or "modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(p)
    return flux


class AlignedFlow(nn.Module):
    """The flow and the head that predicts patch labels from the image tokens half way through the single blocks."""

    def __init__(self, flux: Flux):
        super().__init__()
        self.flux, config = flux, flux.config
        self.label_head = nn.Linear(config.hidden_size, sum(PATCH_CLASSES))
        middle = self.flux.single_blocks[config.depth_single_blocks // 2 - 1]
        middle.register_forward_hook(lambda module, inputs, output: setattr(self, "hidden", output))

    def forward(self, *args) -> tuple[Tensor, Tensor]:
        velocity = self.flux(*args)
        return velocity, self.label_head(self.hidden[:, -velocity.shape[1] :])


def try_compile(flux: Flux) -> None:
    """Compile the blocks, which makes training a fifth faster, where torch.compile works (it needs a C++ compiler)."""
    try:
        compile_blocks(flux, dynamic=True)
    except CompileError as error:
        print(f"{error} Training without it.")


class TextEncoders:
    """The frozen text encoders: ids to (T5 tokens ``[B, L, D]``, CLIP's pooled vector ``[B, D]``)."""

    def __init__(self, t5: T5Encoder, clip: CLIPTextEncoder):
        self.t5, self.clip = t5, clip
        self.empty_t5, self.empty_clip = Tokens()([""])

    @torch.no_grad()
    def __call__(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.t5(t5_ids), self.clip(clip_ids)[1]

    def with_dropout(self, batch: dict[str, Tensor], share: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Encode the captions, with a random share of them replaced by the empty one."""
        drop = torch.rand(len(batch["t5"]), 1, generator=g) < share
        return self(torch.where(drop, self.empty_t5, batch["t5"]), torch.where(drop, self.empty_clip, batch["clip"]))


def add_noise(x0: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``x_t [B, N, 64]``, a logit-normal time ``t [B]`` per image, and the true velocity ``noise - x0``."""
    t = torch.sigmoid(LOGIT_NORMAL[0] + LOGIT_NORMAL[1] * torch.randn(len(x0), generator=g))
    noise = torch.randn(x0.shape, generator=g)
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
    return x_t, t, noise - x0


def position_ids(rows: int, columns: int, axes: int = 3) -> tuple[Tensor, Tensor]:
    """Position ids of the image tokens of a latent, and of the text tokens; FLUX.2's have four axes."""
    return image_ids(rows, columns, axes), text_ids(networks.TEXT_LENGTH, axes)


def random_guidance(count: int, low: float, high: float, g: torch.Generator) -> Tensor:
    """A uniformly random guidance scale per image, ``[count]``."""
    return low + (high - low) * torch.rand(count, generator=g)


def patch_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each patch's colour and form: logits ``[B, N, C]``, labels ``[B, 2, N]``."""
    color, form = logits.float().split(PATCH_CLASSES, dim=-1)
    return F.cross_entropy(color.transpose(1, 2), labels[:, 0]) + F.cross_entropy(form.transpose(1, 2), labels[:, 1])


def flow_loss(
    model: AlignedFlow, batch: dict[str, Tensor], texts: TextEncoders, g: torch.Generator, align: float = ALIGN_WEIGHT
) -> tuple[Tensor, dict[str, float]]:
    """The rectified-flow loss plus ``align`` times the patch-label loss."""
    x_t, t, target = add_noise(pack(batch["latents"]), g)
    img_ids, txt_ids = position_ids(*batch["latents"].shape[-2:], axes=len(model.flux.config.axes_dim))
    with mixed_precision():
        txt, pooled = texts.with_dropout(batch, CAPTION_DROPOUT, g)
        velocity, logits = model(x_t, img_ids, txt.float(), txt_ids, t, pooled.float())
    flow = F.mse_loss(velocity.float(), target)
    labels = patch_label_loss(logits, batch["labels"].flatten(2))
    return flow + align * labels, {"flow": float(flow.detach()), "labels": float(labels.detach())}


Report = Callable[[Flux, int], object]


def train(
    folder: Path, t5: T5Encoder, clip: CLIPTextEncoder, report: Report, made_from: str, resume: bool = True
) -> Flux:
    """Train the flow on the latents in ``folder``, or load it if its run is finished.

    ``report(flux, step)`` is called with the averaged flow every 500 steps.
    """
    torch.manual_seed(SEED)
    model = AlignedFlow(initialise(Flux(networks.FLUX)))
    texts, data = TextEncoders(t5, clip), Latents(folder)
    run = Run("flow", model, RECIPE, folder, resume, f"{made_from}, {len(data.shards)} shards")
    try_compile(model.flux)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        align = ALIGN_WEIGHT if step < ALIGN_SHARE * RECIPE.steps else 0.0
        batch = data.batch(step, RECIPE.batch, SEED)
        return flow_loss(model, batch, texts, torch.Generator().manual_seed(step), align)

    run.train(loss, lambda run: report(averaged_flow(run), run.step), every=500)
    return averaged_flow(run)


def averaged_flow(run: Run) -> Flux:
    """The averaged weights of a run with an :class:`AlignedFlow`, without the head."""
    weights = {k.removeprefix("flux."): v for k, v in run.average.items() if k.startswith("flux.")}
    flux = run.model.flux
    return load_average(type(flux)(flux.config), weights)


# ---------------------------------------------------------------- guidance distillation


def student_of(teacher: Flux) -> Flux:
    """A trainable copy of the teacher with a guidance embedding, which contributes nothing at first."""
    student = Flux(teacher.config.with_(guidance_embed=True))
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert all(k.startswith("guidance_in") for k in missing) and not unexpected
    nn.init.zeros_(student.guidance_in.out_layer.weight)
    nn.init.zeros_(student.guidance_in.out_layer.bias)
    return student.train().requires_grad_(True)


def distillation_loss(
    student: Flux, teacher: Flux, batch: dict[str, Tensor], texts: TextEncoders, g: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Mean squared error between the student's velocity and the teacher's guided one."""
    x_t, t, _ = add_noise(pack(batch["latents"]), g)
    img_ids, txt_ids = position_ids(*batch["latents"].shape[-2:])
    guidance = random_guidance(len(t), *GUIDANCE, g)
    with mixed_precision():
        txt, pooled = texts(batch["t5"], batch["clip"])
        empty_txt, empty_pooled = (x.expand(len(t), *x.shape[1:]) for x in texts(texts.empty_t5, texts.empty_clip))
        with torch.no_grad():
            both_txt, both_pooled = torch.cat([empty_txt, txt]), torch.cat([empty_pooled, pooled])
            both = teacher(x_t.repeat(2, 1, 1), img_ids, both_txt, txt_ids, t.repeat(2), both_pooled)
        v_empty, v_text = both.float().chunk(2)
        target = v_empty + guidance[:, None, None] * (v_text - v_empty)
        velocity = student(x_t, img_ids, txt, txt_ids, t, pooled, guidance)
    loss = F.mse_loss(velocity.float(), target)
    return loss, {"relative": float(loss.detach().sqrt() / target.square().mean().sqrt())}


def distill(
    folder: Path, teacher: Flux, t5: T5Encoder, clip: CLIPTextEncoder, report: Report, resume: bool = True
) -> Flux:
    """Train the guidance-distilled model, or load it if its run is finished."""
    torch.manual_seed(SEED + 1)
    student, texts, data = student_of(teacher), TextEncoders(t5, clip), Latents(folder)
    run = Run("flow-dev", student, DISTILL_RECIPE, folder, resume, fingerprint(teacher))
    try_compile(student)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = data.batch(step, DISTILL_RECIPE.batch, SEED + 1)
        return distillation_loss(student, teacher, batch, texts, torch.Generator().manual_seed(step))

    def averaged(run: Run) -> Flux:
        return load_average(Flux(student.config), run.average)

    run.train(loss, lambda run: report(averaged(run), run.step), every=500)
    return averaged(run)
