"""Redux: a vision encoder that learns which object is where, and a head that expresses it as T5-like tokens.

    labels   a linear head predicts colour and form of the object in each patch from the vision encoder's output
    vectors  the Redux token of a patch should equal T5's vector of the word for the object there
    flow     the tokens, appended to those of the empty prompt, should move the flow as the caption would

The first half of the run trains on labels and vectors, which need no evaluation of the flow. The second half trains on
labels and flow: by then the head produces T5's vectors, and the flow may ask for others. The official Redux head was
trained on a SigLIP that was already trained; ours has to learn to see first.
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.flux import Flux
from fluxedu.models.redux import ReduxHead
from fluxedu.nano import networks
from fluxedu.nano.networks import VisionEncoder
from fluxedu.nano.scenes import COLORS, FORMS, LETTERS
from fluxedu.sampling.latents import text_ids
from training.data import Examples, Tokens
from training.flow import PATCH_CLASSES, TextEncoders, add_noise, patch_label_loss, position_ids, random_guidance
from training.loop import mixed_precision

FIRST_SHARE = 0.5  # share of the run without the flow
LABEL_WEIGHT, VECTOR_WEIGHT = 0.2, 1.0


class ReduxTraining(nn.Module):
    """The vision encoder and the head, which learn, and a frozen copy of the flow."""

    def __init__(self, flux: Flux):
        super().__init__()
        self.vision_encoder = VisionEncoder(networks.CLIP)
        self.head = ReduxHead(networks.CLIP.hidden_size, networks.T5.d_model)
        self.label_head = nn.Linear(networks.CLIP.hidden_size, sum(PATCH_CLASSES))
        self.__dict__["flux"] = deepcopy(flux)  # not registered as a submodule, because it is not trained


@torch.no_grad()
def object_vectors(texts: TextEncoders) -> Tensor:
    """T5's vectors of the colour word and of the form word of every object: ``[colours + 1, forms + 1, 2, D]``.

    Index 0 stands for the background, which gets the vector of T5's padding.
    """
    padding = texts.t5(texts.empty_t5)[0, -1]
    vectors = padding.repeat(*PATCH_CLASSES, 2, 1)
    for c, color in enumerate(COLORS, 1):
        nouns = [f"letter {form}" if form in LETTERS else form for form in FORMS]
        ids, _ = Tokens()([f"a {color} {noun}" for noun in nouns])
        states = texts.t5(ids)
        last = (ids != 0).sum(1) - 2  # the token before </s>
        vectors[c, 1:] = torch.stack([states[:, 1], states[torch.arange(len(ids)), last]], dim=1)
    return vectors


def target_vectors(labels: Tensor, vectors: Tensor) -> Tensor:
    """The target of each patch: labels ``[B, 2, 64]`` to ``[B, 64, D]``, colour and form in turn as on a chessboard."""
    side = int(labels.shape[-1] ** 0.5)
    patch = torch.arange(labels.shape[-1])
    return vectors[labels[:, 0], labels[:, 1], (patch // side + patch % side) % 2]


def flow_matching_term(
    model: ReduxTraining,
    tokens: Tensor,
    batch: Examples,
    texts: TextEncoders,
    guidance_range: tuple[float, float],
    g: torch.Generator,
) -> Tensor:
    """Mean squared error between the flow's velocity given the Redux ``tokens`` and given the caption."""
    x_t, t, _ = add_noise(batch.latents, g)
    guidance = random_guidance(len(t), *guidance_range, g)
    img_ids, txt_ids = position_ids(*batch.grid)
    with torch.no_grad():
        txt, pooled = texts(batch.t5, batch.clip)
        target = model.flux(x_t, img_ids, txt, txt_ids, t, pooled, guidance).float()
        empty_txt, empty_pooled = (x.expand(len(t), *x.shape[1:]) for x in texts(texts.empty_t5, texts.empty_clip))
    txt = torch.cat([empty_txt, tokens], dim=1)
    velocity = model.flux(x_t, img_ids, txt, text_ids(txt.shape[1]), t, empty_pooled, guidance)
    return F.mse_loss(velocity.float(), target)


def redux_loss(
    model: ReduxTraining,
    batch: Examples,
    texts: TextEncoders,
    vectors: Tensor,
    with_flow: bool,
    guidance_range: tuple[float, float],
    g: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """Labels plus vectors, or, ``with_flow``, labels plus flow at guidance scales drawn from ``guidance_range``."""
    with mixed_precision():
        features = model.vision_encoder(batch.condition)
        tokens = model.head(features)
        label_loss = patch_label_loss(model.label_head(features), batch.labels)
        vector_loss = F.mse_loss(tokens.float(), target_vectors(batch.labels, vectors)) / vectors.square().mean()
        values = {"labels": float(label_loss.detach()), "vectors": float(vector_loss.detach())}
        if not with_flow:
            return LABEL_WEIGHT * label_loss + VECTOR_WEIGHT * vector_loss, values
        flow_loss = flow_matching_term(model, tokens, batch, texts, guidance_range, g)
        return LABEL_WEIGHT * label_loss + flow_loss, values | {"flow": float(flow_loss.detach())}
