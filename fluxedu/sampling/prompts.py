"""Prompts: words to ids to vectors, through the two encoders.

CLIP cuts what is beyond its places (77 in the official model), as the public codes do: the vector it
gives is a summary. T5 carries the prompt's content, so a prompt too long for it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from fluxedu.errors import RequestError, describe
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.t5 import T5Encoder
from fluxedu.sampling.step_context import entered


class Tokenizer:
    """A tokenizer folder in the official layout, with padding to a fixed length.

    Reads ``tokenizer.json``; a folder with ``vocab.json`` and ``merges.txt`` only is read through
    ``transformers``.
    """

    def __init__(self, folder: str | Path, pad: str, end: str, length: int, cut: bool):
        self.fast = self._read(Path(folder))
        self.length, self.cut = length, cut
        self.pad_id, self.end_id = self.fast.token_to_id(pad), self.fast.token_to_id(end)
        if self.pad_id is None or self.end_id is None:
            raise RequestError(f"the tokenizer in {folder} does not know {pad if self.pad_id is None else end}.")
        self.fast.no_padding()
        self.fast.no_truncation()

    @staticmethod
    def _read(folder: Path) -> FastTokenizer:
        if (folder / "tokenizer.json").exists():
            try:
                return FastTokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # tokenizers has no error of its own
                raise RequestError(f"{folder / 'tokenizer.json'} is no tokenizer: {describe(error)}.") from None
        if not folder.is_dir():
            raise RequestError(f"there is no tokenizer at {folder}.")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder).backend_tokenizer

    def pieces(self, prompt: str) -> list[str]:
        """The prompt's tokens as text, without padding."""
        return self.fast.encode(prompt).tokens

    def __call__(self, prompts: list[str], length: int | None = None) -> Tensor:
        """Ids ``[B, length]``, padded; raises RequestError for a prompt that does not fit (unless it may be cut)."""
        length = length or self.length
        rows = []
        for prompt in prompts:
            ids = self.fast.encode(prompt).ids
            if len(ids) > length and not self.cut:
                raise RequestError(f"the prompt has {len(ids)} tokens, but T5 reads at most {length}; make it shorter.")
            if len(ids) > length:
                ids = [*ids[: length - 1], self.end_id]
            rows.append(ids + [self.pad_id] * (length - len(ids)))
        return torch.tensor(rows, dtype=torch.long)


@dataclass(frozen=True)
class Conditioning:
    """What the flow knows of prompts: ``txt [B, L, context_in_dim]`` and ``pooled [B, vec_in_dim]``."""

    txt: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, rows: list[Conditioning]) -> Conditioning:
        """Several as one batch."""
        return cls(torch.cat([row.txt for row in rows]), torch.cat([row.pooled for row in rows]))

    def split(self, rows: int) -> list[Conditioning]:
        """Batches of ``rows`` prompts each."""
        return [Conditioning(*pair) for pair in zip(self.txt.split(rows), self.pooled.split(rows), strict=True)]


class PromptEncoder:
    """Both tokenizers and both encoders: prompts in, :class:`Conditioning` out."""

    def __init__(self, clip_tokenizer: Tokenizer, clip: CLIPTextEncoder, t5_tokenizer: Tokenizer, t5: T5Encoder):
        self.clip_tokenizer, self.clip = clip_tokenizer, clip
        self.t5_tokenizer, self.t5 = t5_tokenizer, t5

    def __call__(self, prompts: list[str]) -> Conditioning:
        """A row a prompt; every different one is encoded once, alone, so that no other can change its vectors."""
        known = {prompt: self._one(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.of([known[prompt] for prompt in prompts])

    def _one(self, prompt: str) -> Conditioning:
        device = self.t5.shared.weight.device
        with entered(text=prompt):
            txt = self.t5(self.t5_tokenizer([prompt]).to(device))
            _, pooled = self.clip(self.clip_tokenizer([prompt]).to(device))
        return Conditioning(txt, pooled)
