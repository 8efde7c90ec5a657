"""Stage 2: T5's encoder, on text alone.

To the flow, T5's tokens are a bag: all text positions are (0, 0, 0). So everything the order of the
words says ("left of" or "right of", which colour is whose) must already be *in* the vectors. Two tasks
make it so, both read off a throw-away head and nothing but captions:

    text to text  a small decoder denoises spans and rewrites the caption as a plain list of facts
    tagging       every word of a thing tells the colour, form, size and place of that thing

Both the decoder and the tagger are dropped afterwards, as the official encoder dropped its decoder.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.t5 import T5Encoder
from fluxedu.nano import networks
from fluxedu.nano.scenes import COLORS, FORMS, INVERSE, LETTERS, Claim, caption, sample_scene
from fluxedu.nano.tokenizers import t5_tokenizer
from fluxedu.nano.training.loop import Prefetch, Recipe, Run, use_average

RECIPE = Recipe(steps=2500, lr=2e-3, batch=64, warmup=100, decay=0.5, ema=0.995)
SEED = 22
TARGET_LENGTH = 40
SIDES = ("left of", "right of", "above", "below")
#: the tagger's answers: colour, form, size (or unsaid), and for each side whether the thing is said to be there
TAGS = {"color": len(COLORS), "form": len(FORMS), "size": 3, **{side: 2 for side in SIDES}}


class Pretraining(nn.Module):
    """The encoder with the two heads it is trained through."""

    def __init__(self):
        super().__init__()
        config = networks.T5
        self.encoder = T5Encoder(config)
        layer = nn.TransformerDecoderLayer(
            config.d_model, 4, 256, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder_head = nn.TransformerDecoder(layer, 1, nn.LayerNorm(config.d_model))
        self.decoder_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.decoder_places_embed = nn.Parameter(0.02 * torch.randn(TARGET_LENGTH, config.d_model))
        self.decoder_out_head = nn.Linear(config.d_model, config.vocab_size)
        self.tag_head = nn.Linear(config.d_model, sum(TAGS.values()))
        initialise(self.encoder)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """-> (logits of the target's tokens ``[B, M, V]``, tag logits ``[B, L, sum(TAGS)]``)."""
        states = self.encoder(source)
        shifted = F.pad(target[:, :-1], (1, 0))  # begins with <pad>, as T5's decoder does
        x = self.decoder_embed(shifted) + self.decoder_places_embed[: target.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        out = self.decoder_head(x, states, tgt_mask=mask, tgt_is_causal=True)
        return self.decoder_out_head(out), self.tag_head(states)


def initialise(encoder: T5Encoder) -> None:
    """T5's own initial scales (Mesh TensorFlow's): scores are not divided by sqrt(d), so q is small."""
    c = encoder.config
    scales = {"q": (c.d_model * c.d_kv) ** -0.5, "o": (c.num_heads * c.d_kv) ** -0.5, "wo": c.d_ff**-0.5}
    for name, p in encoder.named_parameters():
        if p.ndim == 2 and "shared" not in name:
            nn.init.normal_(p, std=scales.get(name.split(".")[-2], c.d_model**-0.5))
    nn.init.normal_(encoder.shared.weight, std=1.0)


# ---------------------------------------------------------------- data


def roles(claim: Claim) -> list[set[str]]:
    """For each thing, on which side of another it is said to be."""
    out: list[set[str]] = [set() for _ in claim.things]
    for i, relation, j in claim.relations:
        out[i].add(relation)
        out[j].add(INVERSE[relation])
    return out


def facts(claim: Claim) -> str:
    """The claim as a plain list, always in the same order: thing by thing by colour, then the ground."""
    lines = []
    for (color, form, size), sides in sorted(zip(claim.things, roles(claim), strict=True), key=lambda x: x[0][0]):
        words = [color, "letter " + form if form in LETTERS else form, size or "", *sorted(sides)]
        lines.append(" ".join(w for w in words if w))
    return ", ".join(lines) + f". {claim.background or 'no'} background"


def tags_of(claim: Claim, words: list[str]) -> np.ndarray:
    """Labels for every token: ``[L, len(TAGS)]``, -1 where the token names no thing."""
    labels = np.full((len(words), len(TAGS)), -1)
    for (color, form, size), sides in zip(claim.things, roles(claim), strict=True):
        label = [list(COLORS).index(color), FORMS.index(form), ("small", "large", None).index(size)]
        label += [int(side in sides) for side in SIDES]
        for i, word in enumerate(words):
            if word == "▁" + color:
                end = i + 2 if form in LETTERS else i + 1
                labels[i : end + 1] = label
    return labels


def corrupt(ids: list[int], rng: np.random.Generator, sentinels: list[int]) -> tuple[list[int], list[int]]:
    """Span denoising: about 15 % of the tokens go, in spans of one to three; the target lists them."""
    source, target, i, spans = [], [], 0, 0
    while i < len(ids) - 1:
        if rng.random() < 0.08 and spans < len(sentinels):
            length = min(int(rng.integers(1, 4)), len(ids) - 1 - i)
            source.append(sentinels[spans])
            target += [sentinels[spans], *ids[i : i + length]]
            i, spans = i + length, spans + 1
        else:
            source.append(ids[i])
            i += 1
    return [*source, ids[-1]], [*target, ids[-1]]


class Captions:
    """Batches of captions with their targets; a step's batch depends on the step only."""

    def __init__(self, tokenizer=None, held_out: bool = False):
        self.tokenizer = tokenizer or t5_tokenizer()
        self.held_out = held_out
        self.sentinels = [self.tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(4)]

    def __call__(self, step: int, batch: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([SEED, int(self.held_out), step])
        said = [caption(sample_scene(rng, held_out=self.held_out), rng) for _ in range(batch)]
        ids = self.tokenizer([text for text, _ in said]).input_ids
        told = self.tokenizer([facts(claim) for _, claim in said]).input_ids
        length = networks.TEXT_LENGTH
        source = np.zeros((batch, length), int)
        target = np.zeros((batch, TARGET_LENGTH), int)
        tags = np.full((batch, length, len(TAGS)), -1)
        for b, (row, goal) in enumerate(zip(ids, told, strict=True)):
            if b % 2 and not self.held_out:
                row, goal = corrupt(row, rng, self.sentinels)
            else:
                words = self.tokenizer.convert_ids_to_tokens(row)
                tags[b, : len(row)] = tags_of(said[b][1], words)[:length]
            source[b, : len(row)] = row
            target[b, : len(goal)] = goal[:TARGET_LENGTH]
        target = target[:, : (target != 0).any(0).sum()]
        return {"source": torch.from_numpy(source), "target": torch.from_numpy(target), "tags": torch.from_numpy(tags)}


# ---------------------------------------------------------------- training and probing


def tag_loss(logits: Tensor, tags: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy over the tags, and the share of right answers each."""
    total, right = torch.zeros(()), {}
    for i, (name, part) in enumerate(zip(TAGS, logits.split(list(TAGS.values()), dim=-1), strict=True)):
        known = tags[..., i] >= 0
        total = total + F.cross_entropy(part[known], tags[..., i][known])
        right[name] = float((part[known].argmax(-1) == tags[..., i][known]).float().mean())
    return total / len(TAGS), right


def loss_of(model: Pretraining, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    text, tags = model(batch["source"], batch["target"])
    told = F.cross_entropy(text.flatten(0, 1), batch["target"].flatten(), ignore_index=0)
    tagged, right = tag_loss(tags, batch["tags"])
    return told + tagged, {"text": float(told.detach()), "tags": min(right.values())}


@torch.no_grad()
def tagging_accuracy(model: Pretraining, batches: int = 8) -> dict[str, float]:
    """The trained tagger, on captions of held-out scenes."""
    held = Captions(held_out=True)
    rows = []
    for step in range(batches):
        batch = held(step, 64)
        rows.append(tag_loss(model(batch["source"], batch["target"])[1], batch["tags"])[1])
    return {name: float(np.mean([row[name] for row in rows])) for name in TAGS}


def train(folder: Path, resume: bool = True) -> T5Encoder:
    """Train (or take the finished) encoder."""
    torch.manual_seed(SEED)
    model = Pretraining()
    run = Run("t5", model, RECIPE, folder, resume)

    def report(run: Run) -> None:
        judged = use_average(Pretraining(), run.average)
        shares = " · ".join(f"{k} {100 * v:.2f} %" for k, v in tagging_accuracy(judged).items())
        print(f"\nt5 step {run.step}, held-out captions: {shares}", flush=True)

    with Prefetch(Captions(), RECIPE.batch) as batches:
        run.train(lambda step: loss_of(model, batches(step)), report, every=500)
    return use_average(Pretraining(), run.average).encoder
