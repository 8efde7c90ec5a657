"""FLUX.2 from a prompt to an image: a language model in place of CLIP and T5, and another schedule.

    prompt -> chat -> tokens -> language model -> three of its hidden states, side by side -> Flux2Pipeline

Everything else is FLUX.1's pipeline (pipeline.py). The language model is the transformers library's: Qwen3 for klein,
Mistral Small 3 for dev. Source: black-forest-labs/flux2, text_encoder.py and sampling.py; the models' configurations.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxedu.errors import (
    CheckpointError,
    RequestError,
    check_choice,
    check_integer,
    check_keys,
    check_text,
    checked,
    describe,
)
from fluxedu.files import read_json_file
from fluxedu.sampling.checks import check_finite
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.prompts import Conditioning, PromptEncoder
from fluxedu.sampling.request import Request
from fluxedu.sampling.solvers import from_strength, schedule

#: the hidden states that are read; 0 is the embedding, i the output of layer i
HIDDEN_STATES = {"qwen3": (9, 18, 27), "mistral": (10, 20, 30)}
#: what the chat of dev begins with; the transformer was trained with these very words
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
_PLACEHOLDER = "\ue000"  # a character of no language, to find where the prompt stands in a chat


class ChatTokenizer:
    """A language model's tokenizer, which writes a prompt as a chat, padded to a fixed length.

    tokenizer: one of transformers, with a chat template · kind: ``qwen3`` (the prompt as the user's message, and the
    beginning of an answer without thoughts) or ``mistral`` (a system message, and the prompt) · length: number of
    tokens, the template's and padding included; a longer chat is cut, as in diffusers.
    """

    @checked(RequestError, "tokenizer")
    def __init__(self, tokenizer: Any, kind: str = "qwen3", length: int = 512):
        check_choice("kind", kind, HIDDEN_STATES)
        self.fast, self.kind, self.length = tokenizer, kind, check_integer("length", length, 1, 1 << 16)
        if getattr(tokenizer, "chat_template", None) is None:
            raise RequestError("the tokenizer of a language model must have a chat template, which this one has not.")

    def chat(self, prompt: str) -> str:
        """The text that the language model reads."""
        check_text("a prompt", prompt)
        if self.kind == "qwen3":
            messages = [{"role": "user", "content": prompt}]
            options = {"add_generation_prompt": True, "enable_thinking": False}
        else:
            texts = {"system": SYSTEM_MESSAGE, "user": prompt.replace("[IMG]", "")}  # a mark for images, of which none
            messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
            options = {"add_generation_prompt": False}
        return self.fast.apply_chat_template(messages, tokenize=False, **options)

    def encode(self, prompt: str, **options: Any) -> Any:
        """transformers' encoding of the chat: ``input_ids`` and ``attention_mask``, lists of ``length`` numbers."""
        options |= {"padding": "max_length", "truncation": True, "max_length": self.length}
        return self.fast(self.chat(prompt), add_special_tokens=self.kind == "qwen3", **options)

    @checked()
    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (1 for a token, 0 for padding), each ``[B, length]``."""
        encoded = [self.encode(prompt) for prompt in prompts]
        ids, mask = ([row[name] for row in encoded] for name in ("input_ids", "attention_mask"))
        return torch.tensor(ids, device="cpu"), torch.tensor(mask, device="cpu")

    def spans(self, prompt: str) -> list[tuple[int, int]]:
        """Start and end of each token in the prompt, in characters; (0, 0) for padding and the template's tokens."""
        first = self.chat(_PLACEHOLDER).index(_PLACEHOLDER)
        encoded, spans = self.encode(prompt, return_offsets_mapping=True), []
        for (start, end), is_token in zip(encoded["offset_mapping"], encoded["attention_mask"], strict=True):
            start, end = max(start - first, 0), min(end - first, len(prompt))
            spans.append((start, end) if is_token and end > start else (0, 0))
        return spans

    def pieces(self, prompt: str) -> list[str]:
        """All tokens as text, those of the template included, up to the last that is no padding."""
        encoded = self.encode(prompt)
        count = max((i + 1 for i, is_token in enumerate(encoded["attention_mask"]) if is_token), default=0)
        return self.fast.convert_ids_to_tokens(encoded["input_ids"][:count])

    def padding(self, prompt: str) -> list[int]:
        """The indices of the padding tokens."""
        return [i for i, is_token in enumerate(self.encode(prompt)["attention_mask"]) if not is_token]


class Flux2PromptEncoder(PromptEncoder):
    """A tokenizer and a language model: prompts in, :class:`Conditioning` out, without a pooled vector.

    language_model: of transformers; what predicts the next word, and what sees images, is left out · hidden_states:
    which of them are read, by default those of the published model of the tokenizer's kind. Later layers are left out
    too: nothing depends on them.
    """

    tokenizer: ChatTokenizer = None

    def __init__(self, tokenizer: ChatTokenizer, language_model: nn.Module, hidden_states: tuple[int, ...] = ()):
        self.tokenizer, self.hidden_states = tokenizer, tuple(hidden_states) or HIDDEN_STATES[tokenizer.kind]
        for part in ("model", "language_model"):  # Qwen3ForCausalLM.model, Mistral3Model.language_model
            language_model = getattr(language_model, part, language_model)
        count = max(self.hidden_states) + 1  # one more than is read: the last one of all is normalised
        if len(language_model.layers) < count - 1:
            raise RequestError(f"the language model has {len(language_model.layers)} layers, not {count - 1} or more.")
        language_model.layers = language_model.layers[:count]
        self.language_model = language_model

    @property
    def widths(self) -> tuple[int, int]:
        """The last axis of ``txt`` and of ``pooled``."""
        return len(self.hidden_states) * self.language_model.config.hidden_size, 0

    def networks(self) -> dict[str, nn.Module]:
        """The language model by its name."""
        return {"language_model": self.language_model}

    def _encode(self, texts: list[str]) -> Conditioning:
        device = self.language_model.norm.weight.device  # which is never streamed
        ids, mask = (x.to(device) for x in self.tokenizer(texts))
        txt = self.read(ids, mask)
        check_finite("the language model's hidden states", txt, partial(self.read, ids, mask))
        return Conditioning(txt, txt.new_empty(len(txt), 0))

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``ids``, ``mask [B, L]`` -> the chosen hidden states, side by side: ``[B, L, 3 * width]``."""
        out = self.language_model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return torch.cat([out.hidden_states[i] for i in self.hidden_states], dim=-1)


def read_prompt_encoder(tokenizer: Path, text_encoder: Path, dtype: torch.dtype, length: int) -> Flux2PromptEncoder:
    """The tokenizer and the language model of these folders, on the CPU; nothing is downloaded.

    Raises CheckpointError for another language model than Qwen3 and Mistral 3, and for files that cannot be read.
    """
    import transformers  # slow to import

    model_type = check_keys(f"{text_encoder}", read_json_file(text_encoder / "config.json")).get("model_type")
    classes = {"qwen3": "Qwen3ForCausalLM", "mistral3": "Mistral3ForConditionalGeneration"}
    check_choice("model_type in the language model's config.json", model_type, classes, error=CheckpointError)
    try:
        ids = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        language_model = getattr(transformers, classes[model_type]).from_pretrained(
            text_encoder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{text_encoder} or {tokenizer} cannot be read: {describe(error)}") from None
    kind = "qwen3" if model_type == "qwen3" else "mistral"
    return Flux2PromptEncoder(ChatTokenizer(ids, kind, length), language_model.eval().requires_grad_(False))


@checked(RequestError)
def empirical_mu(tokens: int, steps: int) -> float:
    """``mu`` of FLUX.2's schedule, for an image of ``tokens`` tokens drawn in ``steps`` steps.

    It is a line in the number of tokens: one line for 10 steps and one for 200, and in between linear in the number of
    steps. Above 4300 tokens, the line for 200 steps serves for any number.
    """
    check_integer("tokens", tokens, 1, 1 << 24)
    check_integer("steps", steps, 1, 1 << 16)
    mu_at_10, mu_at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return mu_at_200
    slope = (mu_at_200 - mu_at_10) / 190
    return slope * steps + (mu_at_200 - 200 * slope)


class Flux2Pipeline(FluxPipeline):
    """The whole of FLUX.2: ``pipe("a red circle", seed=0).images[0]``, with the arguments of FLUX.1's pipeline.

    ``prompt_encoder`` is a :class:`Flux2PromptEncoder`, ``flux`` a :class:`fluxedu.models.Flux2`, ``autoencoder`` a
    :class:`fluxedu.models.Flux2AutoEncoder`. Every variant edits pictures, ``reference=`` one or a list of them: their
    tokens are read as in FLUX.1 Kontext, with the frame ids 10, 20, ...
    """

    def times(self, request: Request) -> Tensor:
        """The schedule, shifted by :func:`empirical_mu`; for image-to-image, its last part."""
        tokens = request.shape[0] * request.shape[1] // 4
        mu = empirical_mu(tokens, request.steps) if request.shift is None else math.log(request.shift)
        times = schedule(request.steps, tokens, True, (mu, mu))
        return from_strength(times, request.strength) if request.is_image_to_image else times
