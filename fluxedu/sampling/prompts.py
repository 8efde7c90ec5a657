"""Prompts to vectors: two tokenizers and two text encoders.

CLIP truncates a prompt that is longer than its context (77 tokens in the official model), as other implementations do:
its vector is a summary. T5 carries the content of the prompt, so a prompt that is too long for it is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor, nn

from fluxedu.errors import RequestError, check_integer, check_text, checked, describe
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.t5 import T5Encoder
from fluxedu.sampling.checks import check_finite
from fluxedu.sampling.step_context import at_texts


class Tokenizer:
    """A tokenizer folder in the official layout, with padding to a fixed length.

    pad, end: the padding and the end-of-text token · length: number of tokens, padding included · truncate: whether a
    longer text is cut (else it is a RequestError). Reads ``tokenizer.json``; a folder that has only ``vocab.json`` and
    ``merges.txt`` is read through ``transformers``.
    """

    def __init__(self, folder: str | Path, pad: str, end: str, length: int, truncate: bool):
        self.fast = self._read(Path(folder))
        self.length, self.truncate = length, truncate
        self.pad_id, self.end_id = self.fast.token_to_id(pad), self.fast.token_to_id(end)
        if self.pad_id is None or self.end_id is None:
            missing = pad if self.pad_id is None else end
            raise RequestError(f"the tokenizer in {folder} must have the token {missing}, which it does not.")
        self.fast.no_padding()
        self.fast.no_truncation()

    @staticmethod
    def _read(folder: Path) -> FastTokenizer:
        if (folder / "tokenizer.json").exists():
            try:
                return FastTokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # tokenizers has no error class of its own
                raise RequestError(f"{folder / 'tokenizer.json'} is not a tokenizer: {describe(error)}.") from None
        if not folder.is_dir():
            raise RequestError(f"there is no tokenizer at {folder}.")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder).backend_tokenizer

    def pieces(self, prompt: str) -> list[str]:
        """The prompt's tokens as text, without padding."""
        return self.fast.encode(check_text("the prompt", prompt)).tokens

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """Start and end of each token in the prompt, in characters; equal for tokens that stand for no text."""
        return self.fast.encode(prompt).offsets

    def padding(self, prompt: str) -> range:
        """The indices of the padding tokens: those after the words and the end-of-text token."""
        last = max((i for i, (start, end) in enumerate(self.spans(prompt)) if end > start), default=-1)
        return range(last + 2, self.length)

    @checked()
    def __call__(self, prompts: list[str], length: int | None = None) -> Tensor:
        """Token ids ``[B, length]``, padded; raises RequestError for a prompt that is too long (unless truncated)."""
        length = self.length if length is None else check_integer("length", length, 1, 1 << 16)
        rows = []
        for prompt in prompts:
            ids = self.fast.encode(check_text("a prompt", prompt)).ids
            if len(ids) > length and not self.truncate:
                raise RequestError(f"prompt must have at most {length} T5 tokens, not {len(ids)}; make it shorter.")
            if len(ids) > length:
                ids = [*ids[: length - 1], self.end_id]
            rows.append(ids + [self.pad_id] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.long, device="cpu")


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: ``txt [B, L, context_in_dim]`` (T5's tokens) and ``pooled [B, vec_in_dim]`` (CLIP's vector).

    FLUX.2 has no pooled vector: there ``pooled`` is ``[B, 0]``.
    """

    txt: Tensor
    pooled: Tensor

    @checked()
    def joined(self, other: Conditioning) -> Conditioning:
        """Both, as one batch."""
        return Conditioning(torch.cat([self.txt, other.txt]), torch.cat([self.pooled, other.pooled]))

    @checked()
    def with_tokens(self, tokens: Tensor) -> Conditioning:
        """With more tokens ``[B, M, D]`` after the text's own."""
        if tokens.ndim != 3 or tokens.shape[::2] != self.txt.shape[::2]:
            raise RequestError(f"tokens must be [B, M, D] as txt {list(self.txt.shape)}, not {list(tokens.shape)}.")
        return Conditioning(torch.cat([self.txt, tokens], dim=1), self.pooled)

    @checked()
    def __getitem__(self, rows: slice | list[int]) -> Conditioning:
        """Some of the prompts, or one several times."""
        try:
            return Conditioning(self.txt[rows], self.pooled[rows])
        except (IndexError, TypeError, ValueError):
            raise RequestError(f"there are {len(self.txt)} prompts, so there is no {describe(rows)} of them.") from None


def _known_ids(ids: Tensor, count: int, encoder: str) -> Tensor:
    """The ids, if the encoder has an embedding for each; raises RequestError for the tokenizer of another model."""
    if ids.numel() and int(ids.max()) >= count:
        raise RequestError(f"the tokenizer gives the id {int(ids.max())}, but {encoder} has only {count} tokens.")
    return ids


class PromptEncoder:
    """Both tokenizers and both encoders: prompts in, :class:`Conditioning` out."""

    def __init__(self, clip_tokenizer: Tokenizer, clip: CLIPTextEncoder, t5_tokenizer: Tokenizer, t5: T5Encoder):
        self.clip_tokenizer, self.clip = clip_tokenizer, clip
        self.t5_tokenizer, self.t5 = t5_tokenizer, t5

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text tokens, T5's."""
        return self.t5_tokenizer

    @property
    def widths(self) -> tuple[int, int]:
        """The last axis of ``txt`` and of ``pooled``."""
        return self.t5.config.d_model, self.clip.config.hidden_size

    def networks(self) -> dict[str, nn.Module]:
        """The text encoders by name."""
        return {"clip": self.clip, "t5": self.t5}

    @checked()
    def __call__(self, prompts: list[str], batch: int = 1) -> Conditioning:
        """One row per prompt. Each distinct prompt is encoded once, ``batch`` of them at a time; alone by default, so
        that no other changes its vectors, not even in the last bit.
        """
        check_integer("batch", batch, 1, 1 << 16)
        if not prompts:
            raise RequestError("prompts must be a list with at least one prompt, not [].")
        distinct, rows = list(dict.fromkeys(prompts)), []
        for first in range(0, len(distinct), batch):
            texts = distinct[first : first + batch]
            with at_texts(texts):
                rows.append(self._encode(texts))
        encoded = Conditioning(torch.cat([row.txt for row in rows]), torch.cat([row.pooled for row in rows]))
        return encoded[[distinct.index(prompt) for prompt in prompts]]

    def _encode(self, texts: list[str]) -> Conditioning:
        txt = self._encode_with_t5(texts)
        clip_ids = _known_ids(self.clip_tokenizer(texts), self.clip.config.vocab_size, "CLIP").to(txt.device)
        _, pooled = self.clip(clip_ids)
        check_finite("CLIP's pooled vectors", pooled, partial(self.clip, clip_ids))
        return Conditioning(txt, pooled)

    def _encode_with_t5(self, texts: list[str]) -> Tensor:
        t5_ids = _known_ids(self.t5_tokenizer(texts), self.t5.config.vocab_size, "T5").to(self.t5.shared.weight.device)
        txt = self.t5(t5_ids)
        check_finite("T5's embeddings", txt, partial(self.t5, t5_ids))
        return txt


class T5Prompts(PromptEncoder):
    """T5 alone, without a pooled vector: the miniature FLUX.2 reads it in place of a language model."""

    def __init__(self, t5_tokenizer: Tokenizer, t5: T5Encoder):
        self.t5_tokenizer, self.t5 = t5_tokenizer, t5

    @property
    def widths(self) -> tuple[int, int]:
        """The last axis of ``txt`` and of ``pooled``."""
        return self.t5.config.d_model, 0

    def networks(self) -> dict[str, nn.Module]:
        """T5 by its name."""
        return {"t5": self.t5}

    def _encode(self, texts: list[str]) -> Conditioning:
        txt = self._encode_with_t5(texts)
        return Conditioning(txt, txt.new_empty(len(txt), 0))
