"""What Redux learns: an eye that knows what stands where, and a head that says it in T5's words.

    named     a linear head must name colour and form of what lies in each of the eye's places
    spelled   the head's token of a place shall be the vector that T5 gives the word for it
    flow      the picture's tokens, behind those of the empty prompt, shall move the flow as its caption would have

The first two for the first half of the run, since they need no pass through the flow; then the first and the last: by
then the head knows the words, and the flow may ask for others. The official head was trained on a SigLIP that could see
already; ours has to learn to see first.
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.flux import Flux
from fluxedu.models.redux import ReduxHead
from fluxedu.nano import networks
from fluxedu.nano.networks import Eye
from fluxedu.nano.scenes import COLORS, FORMS, LETTERS
from fluxedu.nano.training.flow import Texts, misnamed, noisy, places, strengths
from fluxedu.nano.training.latents import Tokens
from fluxedu.nano.training.loop import mixed_precision
from fluxedu.nano.training.members import Examples
from fluxedu.sampling.latents import text_ids

SEEING = 0.5  # share of the run without the flow
NAMED, SPELLED = 0.2, 1.0  # weights


class HeadAtWork(nn.Module):
    """The eye and the head that learn, and the frozen flow that they are judged through."""

    def __init__(self, flux: Flux):
        super().__init__()
        self.eye = Eye(networks.CLIP)
        self.head = ReduxHead(networks.CLIP.hidden_size, networks.T5.d_model)
        self.read_head = nn.Linear(networks.CLIP.hidden_size, len(COLORS) + 1 + len(FORMS) + 1)
        self.__dict__.update(flux=deepcopy(flux))  # not a parameter of this module: it does not learn


@torch.no_grad()
def spellings(texts: Texts) -> Tensor:
    """T5's vectors of colour and form of every thing, for the ground padding's: ``[C + 1, F + 1, 2, D]``."""
    padding = texts.t5(texts.empty_t5)[0, -1]
    said = padding.repeat(len(COLORS) + 1, len(FORMS) + 1, 2, 1)
    for c, color in enumerate(COLORS, 1):
        nouns = [f"letter {form}" if form in LETTERS else form for form in FORMS]
        ids, _ = Tokens()([f"a {color} {noun}" for noun in nouns])
        vectors = texts.t5(ids)
        last = (ids != 0).sum(1) - 2  # before </s>
        said[c, 1:] = torch.stack([vectors[:, 1], vectors[torch.arange(len(ids)), last]], dim=1)
    return said


def spelled_at(labels: Tensor, said: Tensor) -> Tensor:
    """Colour and form in turns, as on a chessboard: labels ``[B, 2, 64]`` -> ``[B, 64, D]``."""
    side = int(labels.shape[-1] ** 0.5)
    place = torch.arange(labels.shape[-1])
    return said[labels[:, 0], labels[:, 1], (place // side + place % side) % 2]


def flow_term(model: HeadAtWork, said: Tensor, batch: Examples, texts: Texts, between, g: torch.Generator) -> Tensor:
    """How far the flow that reads the picture's tokens is from the one that reads its caption."""
    x_t, t, _ = noisy(batch.latents, g)
    img_ids, txt_ids = places(*batch.cells)
    strength = strengths(len(t), between, g)
    with torch.no_grad():
        txt, pooled = texts(batch.t5, batch.clip)
        target = model.flux(x_t, img_ids, txt, txt_ids, t, pooled, strength).float()
        empty, nothing = (x.expand(len(t), *x.shape[1:]) for x in texts(texts.empty_t5, texts.empty_clip))
    seen = torch.cat([empty, said], dim=1)
    velocity = model.flux(x_t, img_ids, seen, text_ids(seen.shape[1]), t, nothing, strength)
    return F.mse_loss(velocity.float(), target)


def redux_loss(
    model: HeadAtWork, batch: Examples, texts: Texts, words: Tensor, flowing: bool, between, g: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """Named and spelled, or, when it is ``flowing``, named and flow."""
    with mixed_precision():
        seen = model.eye(batch.given)
        said = model.head(seen)
        named = misnamed(model.read_head(seen), batch.labels)
        spelled = F.mse_loss(said.float(), spelled_at(batch.labels, words)) / words.square().mean()
        value = NAMED * named + (0 if flowing else SPELLED) * spelled
        shown = {"named": float(named.detach()), "spelled": float(spelled.detach())}
        if flowing:
            flow = flow_term(model, said, batch, texts, between, g)
            value, shown = value + flow, {**shown, "flow": float(flow.detach())}
    return value, shown
