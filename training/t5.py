"""Stage 2: T5's encoder, trained on text alone.

All text tokens of FLUX have the position (0, 0, 0), so to the flow they are an unordered set. Whatever the order of the
words expresses ("left of" or "right of", which colour belongs to which shape) must therefore already be in the vectors.
Two tasks, defined in ``fluxedu/nano/text_tasks.py``, see to that, each with a head of its own:

    text to text   a small decoder fills in masked spans, or rewrites the caption as a list of facts
    tagging        every token of an object predicts that object's colour, form, size and relations

Both heads are dropped afterwards, just as FLUX.1 uses only the encoder of the official T5.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.t5 import T5Encoder
from fluxedu.nano import networks
from fluxedu.nano.scenes import caption, sample_scene
from fluxedu.nano.text_tasks import TAGS, corrupt_spans, facts, tag_labels
from fluxedu.nano.tokenizers import t5_tokenizer
from training.loop import Prefetch, Recipe, Run, load_average

RECIPE = Recipe(steps=2500, lr=2e-3, batch=64, warmup=100, decay=0.5, ema=0.995)
SEED = 22
TARGET_LENGTH = 40  # tokens of the decoder's target


class Pretraining(nn.Module):
    """The encoder with the decoder and the tagging head."""

    def __init__(self):
        super().__init__()
        config = networks.T5
        self.encoder = T5Encoder(config)
        layer = nn.TransformerDecoderLayer(
            config.d_model, 4, 256, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder_head = nn.TransformerDecoder(layer, 1, nn.LayerNorm(config.d_model))
        self.decoder_embed = nn.Embedding(config.vocab_size, config.d_model)
        self.decoder_position_embed = nn.Parameter(0.02 * torch.randn(TARGET_LENGTH, config.d_model))
        self.decoder_out_head = nn.Linear(config.d_model, config.vocab_size)
        self.tag_head = nn.Linear(config.d_model, sum(TAGS.values()))
        initialise(self.encoder)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Ids ``[B, L]`` and ``[B, M]`` to logits of the target ``[B, M, V]`` and of the tags ``[B, L, sum(TAGS)]``."""
        states = self.encoder(source)
        shifted = F.pad(target[:, :-1], (1, 0))  # starts with <pad>, as T5's decoder does
        x = self.decoder_embed(shifted) + self.decoder_position_embed[: target.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        out = self.decoder_head(x, states, tgt_mask=mask, tgt_is_causal=True)
        return self.decoder_out_head(out), self.tag_head(states)


def initialise(encoder: T5Encoder) -> None:
    """T5's own initial scales (Mesh TensorFlow's). T5 does not divide scores by sqrt(d), so q starts small."""
    c = encoder.config
    scales = {"q": (c.d_model * c.d_kv) ** -0.5, "o": (c.num_heads * c.d_kv) ** -0.5, "wo": c.d_ff**-0.5}
    for name, p in encoder.named_parameters():
        if p.ndim == 2 and "shared" not in name:
            nn.init.normal_(p, std=scales.get(name.split(".")[-2], c.d_model**-0.5))
    nn.init.normal_(encoder.shared.weight, std=1.0)


class Captions:
    """Batches of captions with their targets; a batch depends only on its step.

    Even rows ask for the facts and have tags, odd rows are span corruption. Held-out batches are all of the first kind.
    """

    def __init__(self, tokenizer=None, held_out: bool = False):
        self.tokenizer = tokenizer or t5_tokenizer()
        self.held_out = held_out
        self.sentinels = [self.tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(4)]

    def __call__(self, step: int, batch: int) -> dict[str, Tensor]:
        """``source`` ids [B, L], ``target`` ids [B, M], ``tags`` [B, L, len(TAGS)], -1 where there is none."""
        rng = np.random.default_rng([SEED, int(self.held_out), step])
        captions = [caption(sample_scene(rng, held_out=self.held_out), rng) for _ in range(batch)]
        caption_ids = self.tokenizer([text for text, _ in captions]).input_ids
        fact_ids = self.tokenizer([facts(claim) for _, claim in captions]).input_ids
        length = networks.TEXT_LENGTH
        source = np.zeros((batch, length), int)
        target = np.zeros((batch, TARGET_LENGTH), int)
        tags = np.full((batch, length, len(TAGS)), -1)
        for b in range(batch):
            inputs, outputs = caption_ids[b], fact_ids[b]
            if b % 2 and not self.held_out:
                inputs, outputs = corrupt_spans(inputs, rng, self.sentinels)
            else:
                tokens = self.tokenizer.convert_ids_to_tokens(inputs)
                tags[b, : len(inputs)] = tag_labels(captions[b][1], tokens)[:length]
            source[b, : len(inputs)] = inputs
            target[b, : len(outputs)] = outputs[:TARGET_LENGTH]
        target = target[:, : (target != 0).any(0).sum()]
        return {"source": torch.from_numpy(source), "target": torch.from_numpy(target), "tags": torch.from_numpy(tags)}


def tag_loss(logits: Tensor, tags: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy over the tags, and the accuracy of each tag."""
    total, accuracy = torch.zeros(()), {}
    for i, (name, tag_logits) in enumerate(zip(TAGS, logits.split(list(TAGS.values()), dim=-1), strict=True)):
        labelled = tags[..., i] >= 0
        total = total + F.cross_entropy(tag_logits[labelled], tags[..., i][labelled])
        accuracy[name] = float((tag_logits[labelled].argmax(-1) == tags[..., i][labelled]).float().mean())
    return total / len(TAGS), accuracy


def pretraining_loss(model: Pretraining, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the target text plus :func:`tag_loss`."""
    text_logits, tag_logits = model(batch["source"], batch["target"])
    text_loss = F.cross_entropy(text_logits.flatten(0, 1), batch["target"].flatten(), ignore_index=0)
    tagging_loss, accuracy = tag_loss(tag_logits, batch["tags"])
    return text_loss + tagging_loss, {"text": float(text_loss.detach()), "tags": min(accuracy.values())}


@torch.no_grad()
def tagging_accuracy(model: Pretraining, batches: int = 8) -> dict[str, float]:
    """The accuracy of each tag on captions of held-out scenes."""
    captions = Captions(held_out=True)
    rows = []
    for step in range(batches):
        batch = captions(step, 64)
        rows.append(tag_loss(model(batch["source"], batch["target"])[1], batch["tags"])[1])
    return {name: float(np.mean([row[name] for row in rows])) for name in TAGS}


def train(folder: Path, resume: bool = True) -> T5Encoder:
    """Train the encoder, or load it if its run is finished."""
    torch.manual_seed(SEED)
    model = Pretraining()
    run = Run("t5", model, RECIPE, folder, resume)

    def report(run: Run) -> None:
        accuracy = tagging_accuracy(load_average(Pretraining(), run.average))
        shares = " · ".join(f"{name} {100 * share:.2f} %" for name, share in accuracy.items())
        print(f"\nt5 step {run.step}, held-out captions: {shares}", flush=True)

    with Prefetch(Captions(), RECIPE.batch) as batches:
        run.train(lambda step: pretraining_loss(model, batches(step)), report, every=500)
    return load_average(Pretraining(), run.average).encoder
