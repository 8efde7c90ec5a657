"""Selection: which steps, which pass of guidance, which tokens and heads of a value an instrument works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from fluxedu.attention_map import AttentionMap
from fluxedu.errors import InstrumentError, describe
from fluxedu.instruments.named import Named
from fluxedu.instruments.recording import StepKey
from fluxedu.instruments.reductions import MapView, Value
from fluxedu.instruments.tokens import Word, as_list, contains_words, prompt_at, token_indices_at, tokenizer_at
from fluxedu.sampling.step_context import StepContext, Steps, checked_steps, current_context, integers, is_selected

PASSES = ("negative", "prompted")  # of classifier-free guidance, in the order of the batch


def checked_heads(heads: Sequence[int] | int | None) -> list[int] | None:
    """Head indices as a list; raises InstrumentError for what selects no head."""
    try:
        found = None if heads is None else integers(heads)
    except TypeError:
        raise InstrumentError(f"heads must be a number or a list of numbers, not {describe(heads)}.") from None
    if found == []:
        raise InstrumentError("heads must not be empty; leave it out for all of them.")
    return [found] if isinstance(found, int) else found


@dataclass
class Selection:
    """Which values are recorded, and which part of each; None selects everything. Arguments as in :class:`record`."""

    steps: Steps = None
    tokens: list[Word] | None = None
    heads: list[int] | None = None
    passes: str | None = None
    map_budget: float = inf  # bytes of an attention map that may be computed
    missed: str = ""  # why a value was left out, to say so when all were

    @classmethod
    def of(cls, steps: Steps, tokens, heads, passes: str | None, map_budget: float) -> Selection:
        """From a user's arguments; raises InstrumentError for those that select nothing."""
        if not isinstance(passes, (str, type(None))) or passes not in (None, *PASSES):
            raise InstrumentError(f"passes must be 'prompted', 'negative' or None for both, not {describe(passes)}.")
        tokens = None if tokens is None else as_list(tokens)
        return cls(checked_steps(steps), tokens, checked_heads(heads), passes, map_budget)

    # ---------------------------------------------------------------- which values

    def includes(self, value: Any, site: str, key: StepKey) -> bool:
        """Whether the value's step and pass of guidance are selected."""
        context = current_context()
        steps = None if context is None else context.steps
        if not is_selected(self.steps, key.step, steps):
            self.missed = f"the run has {steps} steps, and none of them is in steps={describe(self.steps)}"
            return False
        if self._is_other_pass(site, value, context):
            self.missed = self.missed or f"there was no {self.passes} pass"
            return False
        return True

    def number_of_steps(self, count: int) -> int:
        """How many of ``count`` steps are selected."""
        return sum(is_selected(self.steps, step, count) for step in range(count))

    def _is_other_pass(self, site: str, value: Any, context: StepContext | None) -> bool:
        """Whether the value belongs only to the guidance pass that is not selected."""
        if self.passes is None or context is None or context.step is None:
            return False
        is_negative = self.passes == "negative"
        if not context.request.uses_cfg:  # the only pass is the prompted one
            return is_negative and not site.startswith("sample.")
        if site in ("sample.negative", "sample.prompted"):
            return not site.endswith(self.passes)
        is_single = not site.startswith("sample.") and value.shape[0] == 1  # guidance is off at this time
        return is_single and is_negative

    # ---------------------------------------------------------------- which part of a value

    def part(self, value: Named | AttentionMap, site: str) -> Value:
        """The selected pass, tokens and heads of a value."""
        context = current_context()
        return self._select_tokens(self._select_pass(value, context), site, context)

    def _select_pass(self, value: Named | AttentionMap, context: StepContext | None) -> Named | AttentionMap:
        if context is None or not context.request.uses_cfg:
            return value
        has_words = self.tokens is not None and contains_words(self.tokens)
        kept = self.passes or ("prompted" if has_words else None)  # words belong to the prompt, so they mean its pass
        if kept is None:
            return value
        if isinstance(value, AttentionMap):
            return value.picture(PASSES.index(kept)) if value.shape[0] == 2 else value
        return value.take("batch", [PASSES.index(kept)]) if value.sizes.get("batch") == 2 else value

    def _select_tokens(self, value: Named | AttentionMap, site: str, context: StepContext | None) -> Value:
        tokens, labels = None, None
        if self.tokens is not None:
            tokens = token_indices_at(context, site, self.tokens, self.passes == "negative")
            if context is not None:
                pieces = tokenizer_at(context, site).pieces(prompt_at(context, self.passes == "negative"))
                labels = [pieces[i] if 0 <= i < len(pieces) else "<pad>" for i in tokens]

        if isinstance(value, AttentionMap):
            _check_tokens(site, tokens, value.txt_len)
            for head in self.heads or []:
                if not -value.shape[1] <= head < value.shape[1]:
                    raise InstrumentError(f"{site!r} has {value.shape[1]} heads, so there is no head {head}.")
            queries = slice(None) if tokens is None else _image_queries(value.txt_len, value.shape[2])
            return MapView(value, self.heads, queries, tokens, labels, self.map_budget)

        if tokens is not None and value.axes[-1] == "key":  # a map that an intervention replaced by a tensor
            in_encoder = context is None or context.text is not None
            txt_len = value.shape[-1] if in_encoder else context.txt_len
            _check_tokens(site, tokens, txt_len)
            queries = range(value.sizes["query"])[_image_queries(txt_len, value.sizes["query"])]
            value = value.take("query", list(queries)).take("key", tokens)
            value = Named(value.tensor, value.axes, {} if labels is None else {"key": labels})
        elif tokens is not None:
            axis = next((a for a in ("text", "token") if a in value.axes), None)
            if axis is None:
                raise InstrumentError(f"{site!r} has no text tokens (its axes are {', '.join(value.axes)}).")
            is_joint = context is not None and axis == "token"
            _check_tokens(site, tokens, context.txt_len if is_joint else value.sizes[axis])
            value = value.take(axis, tokens)
        return value if self.heads is None else value.take("head", self.heads)


def _check_tokens(site: str, tokens: list[int] | None, txt_len: int) -> None:
    for token in tokens or []:
        if not 0 <= token < txt_len:
            raise InstrumentError(f"{site!r} has {txt_len} text tokens, so there is no token {token}.")


def _image_queries(txt_len: int, queries: int) -> slice:
    """With tokens=, the queries of a joint map are the image tokens; a text encoder's are all its tokens."""
    return slice(txt_len if txt_len < queries else 0, None)
