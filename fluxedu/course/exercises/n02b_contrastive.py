"""Notebook 02b: contrastive learning."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, mistakes, wrong


def _pairs() -> list[tuple]:
    g = torch.Generator().manual_seed(4)
    return [
        (3 * torch.randn(5, 8, generator=g), 0.5 * torch.randn(5, 8, generator=g), 10.0),
        (torch.randn(3, 4, generator=g), 2 * torch.randn(3, 4, generator=g), 2.5),
        (torch.randn(64, 96, generator=g), 40 * torch.randn(64, 96, generator=g), 100.0),  # the page's own size
    ]


def _term_by_term(images: Tensor, captions: Tensor, temperature: float) -> Tensor:
    """The paper's formula, one pair at a time: the mean of -log(softmax of the right pair), in both directions."""
    terms = []
    for i in range(len(images)):
        row = temperature * F.cosine_similarity(images[i].double(), captions.double(), dim=-1)  # captions of image i
        column = temperature * F.cosine_similarity(captions[i].double(), images.double(), dim=-1)  # images of caption i
        terms.append(row.exp().sum().log() - row[i])
        terms.append(column.exp().sum().log() - column[i])
    return torch.stack(terms).mean().float()


@exercise(
    "clip.contrast",
    minutes=12,
    difficulty=3,
    cases=_pairs,
    against=_term_by_term,
    hints=(
        "Make a table of scores with one row per image and one column per caption. The right pairs are on its "
        "diagonal, so this is a classification, once over each row and once over each column.",
        "After `F.normalize(x, dim=-1)` a matrix product gives cosines. `F.cross_entropy(scores, target)` needs the "
        "right column of each row, `torch.arange(len(scores))`. For the other direction, transpose the table.",
        "`scores = temperature * F.normalize(images, dim=-1) @ F.normalize(captions, dim=-1).T`, then the mean of "
        "`F.cross_entropy(scores, target)` and `F.cross_entropy(scores.T, target)`.",
    ),
)
def contrast(images: Tensor, captions: Tensor, temperature: float) -> Tensor:
    """CLIP's loss for the vectors of N images and of their captions, `[N, D]` each, in the same order: one number.

    The score of a pair is `temperature` times its cosine similarity. Every image must find its caption among the N
    (softmax over captions), and every caption its image; the loss is the mean of the two cross-entropies.
    """
    scores = temperature * F.normalize(images, dim=-1) @ F.normalize(captions, dim=-1).T  # [N, N]
    target = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def _loss(scores: Tensor) -> Tensor:
    target = torch.arange(len(scores))
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


wrong("clip.contrast", "the vectors are not normalised, so longer vectors get higher scores whatever their direction.")(
    lambda images, captions, temperature: _loss(temperature * images @ captions.T)
)


@wrong("clip.contrast", "only images look for captions; captions must look for images too.")
def _one_direction(images, captions, temperature):
    scores = temperature * F.normalize(images, dim=-1) @ F.normalize(captions, dim=-1).T
    return F.cross_entropy(scores, torch.arange(len(scores)))


wrong("clip.contrast", "you divide by the temperature; here it multiplies (CLIP stores the factor, not its inverse).")(
    lambda images, captions, temperature: contrast(images, captions, 1 / temperature)
)
wrong("clip.contrast", "the two cross-entropies are added; take their mean.")(
    lambda images, captions, temperature: 2 * contrast(images, captions, temperature)
)


@wrong("clip.contrast", "you normalise over the batch; each vector must have length 1 (dim=-1).")
def _over_batch(images, captions, temperature):
    return _loss(temperature * F.normalize(images, dim=0) @ F.normalize(captions, dim=0).T)


class _Towers(nn.Module):
    """Two linear towers: small enough to train in a check."""

    def __init__(self, image_weight: Tensor, text_weight: Tensor):
        super().__init__()
        self.image_weight, self.text_weight = nn.Parameter(image_weight.clone()), nn.Parameter(text_weight.clone())
        self.log_temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        captions = F.embedding(ids, self.text_weight).mean(dim=1)
        return images @ self.image_weight, captions, self.log_temperature.exp()


def _batches() -> list[tuple]:
    g = torch.Generator().manual_seed(5)
    cases = []
    for pairs, pixels, vocabulary, dim, rate in ((5, 6, 9, 4, 0.5), (64, 12, 40, 16, 2.0)):
        images, ids = torch.randn(3, pairs, pixels, generator=g), torch.randint(vocabulary, (3, pairs, 7), generator=g)
        weights = torch.randn(pixels, dim, generator=g), torch.randn(vocabulary, dim, generator=g)
        cases.append((*weights, images, ids, rate))
    return cases


def _three_steps(answer: Callable, image_weight: Tensor, text_weight: Tensor, images: Tensor, ids: Tensor, rate: float):
    """The losses that three training steps return, and the parameters that they leave behind."""
    towers = _Towers(image_weight, text_weight)
    optimizer = torch.optim.SGD(towers.parameters(), lr=rate)
    with torch.enable_grad():
        losses = [answer(towers, _contrast, optimizer, *batch) for batch in zip(images, ids, strict=True)]
    if any(loss is None for loss in losses):
        return None
    return torch.stack([torch.as_tensor(loss).detach().float() for loss in losses]), *(
        p.detach() for p in towers.parameters()
    )


def _contrast(images: Tensor, captions: Tensor, temperature: Tensor) -> Tensor:
    return _loss(temperature * F.normalize(images, dim=-1) @ F.normalize(captions, dim=-1).T)


def _by_hand(towers, loss, optimizer, images, ids):
    """The reference: gradient descent written out, with `autograd.grad` instead of stored gradients."""
    parameters = list(towers.parameters())
    value = loss(*towers(images, ids))
    gradients = torch.autograd.grad(value, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= optimizer.param_groups[0]["lr"] * gradient
    return value.item()


@exercise(
    "clip.train_step",
    minutes=10,
    difficulty=2,
    cases=_batches,
    call=_three_steps,
    against=_by_hand,
    hints=(
        "A training step has four parts: compute the loss, remove the gradients of the last step, compute the new "
        "ones, and change the weights.",
        "`towers(images, ids)` returns three values, which are the three arguments of `loss`. `optimizer.zero_grad()`, "
        "`value.backward()` and `optimizer.step()` follow in this order.",
        "`value = loss(*towers(images, ids))`, then the three calls, then `return value.item()`.",
    ),
)
def train_step(towers: nn.Module, loss, optimizer, images: Tensor, ids: Tensor) -> float:
    """One step of contrastive training on a batch of N pairs. Returns the loss before the step, as a number.

    `towers(images, ids)` returns the vectors of the images, the vectors of the captions, and the temperature. `loss`
    takes these three. `optimizer` holds the weights of both towers and the temperature, and changes them all.
    """
    value = loss(*towers(images, ids))
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()


@mistakes(
    "clip.train_step",
    ("no zero_grad", "the gradients of earlier batches are added to those of this one; call optimizer.zero_grad()."),
    ("no step", "the weights never change: call optimizer.step() last, with the new gradients still in place."),
    ("early step", "the optimizer steps before the backward pass, so it uses the gradients of the last batch."),
    ("image tower only", "the captions' vectors are detached, so the text tower learns nothing."),
    ("text tower only", "the images' vectors are detached, so the image tower learns nothing."),
    ("fixed temperature", "the temperature is detached, so it is not trained with the towers."),
    ("new loss", "you return the loss of the changed weights; return the one from before the step."),
    ("wrong pairs", "the captions are in another order than the images: pair i must stay pair i."),
)
def _step_with(mistake, towers, loss, optimizer, images, ids):
    a, b, temperature = towers(images, ids)
    a = a.detach() if mistake == "text tower only" else a
    b = b.detach() if mistake == "image tower only" else b.flip(0) if mistake == "wrong pairs" else b
    value = loss(a, b, temperature.detach() if mistake == "fixed temperature" else temperature)
    if mistake == "early step":
        optimizer.step()
    if mistake != "no zero_grad":
        optimizer.zero_grad()
    value.backward()
    if mistake not in ("no step", "early step"):
        optimizer.step()
    return loss(*towers(images, ids)).item() if mistake == "new loss" else value.item()
