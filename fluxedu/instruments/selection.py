"""Selection: the part of a value that an instrument records or changes.

The arguments mean the same on ``record``, ``intervene``, ``ablate`` and ``patch``; only the defaults of passes and
queries differ:

- steps, times: which steps, by their number (an index, a list, a slice) or by their time: two ends in [0, 1], both
  included, where 1 is noise. Values that are computed before or after sampling (by text encoders and the autoencoder)
  are always recorded; interventions change them only if neither argument is given.
- passes: "prompted", "negative" or "both", the passes of classifier-free guidance. By default a recorder records both,
  but only the prompted one if tokens or queries have words; an intervention changes the prompted one.
- streams: "img" or "txt". At an attention map, the stream of the keys.
- tokens: words of the prompt, indices, regions of the image (``fe.region``), or a list of them. An index counts the
  tokens of the stream in ``streams=``, or else those of the site itself: at a joint site, text comes first. At an
  attention map they are keys.
- queries: words, indices, regions or a stream: which queries of an attention map. By default all; for a recorder with
  tokens, those of the image.
- heads: which heads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from fluxedu.attention_map import AttentionMap
from fluxedu.errors import InstrumentError, WordNotInPrompt, describe
from fluxedu.instruments.named import Named
from fluxedu.instruments.reductions import MAP_AXES, MapView, Value
from fluxedu.instruments.tokens import Region, Token, as_list, prompt_at, token_indices_at, tokenizer_at
from fluxedu.sampling.latents import PATCH
from fluxedu.sampling.step_context import StepContext, Steps, checked_steps, current_context, integers, is_selected

PASSES = ("negative", "prompted")  # of classifier-free guidance, in the order of the batch
STREAMS = ("txt", "img")
ONE_PASS_SITES = ("sample.negative", "sample.prompted")
TOKEN_AXES = ("key", "text", "image", "token")
Times = tuple[float, float]
Tokens = Sequence[Token] | Token
Indices = dict[str, list[int]]  # name of an axis -> selected indices


def checked_heads(heads: Sequence[int] | int | None) -> list[int] | None:
    """Head indices as a list; raises InstrumentError for what selects no head."""
    try:
        found = None if heads is None else integers(heads)
    except TypeError:
        raise InstrumentError(f"heads must be a number or a list of numbers, not {describe(heads)}.") from None
    if found == []:
        raise InstrumentError("heads must not be empty; leave it out for all of them.")
    return [found] if isinstance(found, int) else found


def checked_streams(streams: Sequence[str] | str | None) -> tuple[str, ...] | None:
    names = (streams,) if isinstance(streams, str) else streams
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not names or any(name not in STREAMS for name in names):
        raise InstrumentError(f"streams must be 'txt', 'img' or both, not {describe(streams)}.")
    return tuple(dict.fromkeys(names))


def checked_times(times: Times | None) -> Times | None:
    if times is None:
        return None
    try:
        low, high = sorted(float(t) for t in times)
        if not (0 <= low and high <= 1):  # also False for NaN
            raise ValueError
    except (TypeError, ValueError, RuntimeError):
        raise InstrumentError(f"times must be a pair (from, to) in [0, 1], not {describe(times)}.") from None
    return low, high


def passes_of(site: str, axes: Sequence[str] | None, batch: int, context: StepContext | None) -> tuple[str, ...]:
    """The pass of classifier-free guidance at each index of the batch; empty for a value that both passes share."""
    if site in ONE_PASS_SITES:
        return (site.removeprefix("sample."),) * batch
    if context is None:
        return ("prompted",) * batch
    if context.text is not None:
        return ("negative" if context.negative else "prompted",) * batch
    if axes is not None and axes[:1] != ("batch",):  # the positions of tokens
        return ()
    if context.request.uses_cfg and batch == 2:
        return PASSES
    if context.step is None or site.startswith("sample."):
        return ()
    return ("prompted",) * batch  # guidance is off, or off at this time


def stream_of(site: str, axes: Sequence[str]) -> str | None:
    """The stream of a site, ``txt`` or ``img``; None if it joins both, or has no tokens."""
    named = re.search(r"(?:^|\.)(txt|img)(_|$)", site)
    if named:
        return named[1]
    if "text" in axes or site.startswith(("clip.", "t5.")):
        return "txt"
    return "img" if "image" in axes or site.startswith("ae.") else None


@dataclass
class Selection:
    """Which values an instrument works on, and which part of each; None selects everything. See :meth:`of`."""

    steps: Steps = None
    times: Times | None = None
    passes: str | None = None
    streams: tuple[str, ...] | None = None
    tokens: list[Token] | None = None
    queries: list[Token] | None = None
    heads: list[int] | None = None
    image_queries: bool = False  # with tokens=, the queries of a joint map are by default the image tokens
    map_budget: float = inf  # bytes of an attention map that may be computed
    included: set[int] = field(default_factory=set)  # the selected steps that have been computed
    missed: str = ""  # why a value was left out, to say so when all were

    @classmethod
    def of(cls, steps=None, times=None, passes=None, streams=None, tokens=None, queries=None, heads=None) -> Selection:
        """From a user's arguments; raises InstrumentError for those that select nothing."""
        if not isinstance(passes, (str, type(None))) or passes not in (None, "both", *PASSES):
            raise InstrumentError(f"passes must be 'prompted', 'negative' or 'both', not {describe(passes)}.")
        tokens = None if tokens is None else as_list(tokens)
        queries = None if queries is None else as_list(queries, "queries")
        steps, times, streams = checked_steps(steps), checked_times(times), checked_streams(streams)
        return cls(steps, times, passes, streams, tokens, queries, checked_heads(heads))

    @property
    def is_whole(self) -> bool:
        """Whether the selected values are complete."""
        return self.streams is self.tokens is self.queries is self.heads is None

    @property
    def has_words(self) -> bool:
        """Whether any of the tokens or queries is a word of the prompt."""
        return any(isinstance(i, str) and i not in STREAMS for i in [*(self.tokens or []), *(self.queries or [])])

    # ---------------------------------------------------------------- which values

    def includes_step(self, step: int | None, time: float | None, steps: int | None) -> bool:
        """Whether a step and its time are selected. What happens outside of the steps always is."""
        if step is None:
            return True
        if self.times is not None and time is None:
            raise InstrumentError("times= is known only while a pipeline runs; without one, use steps=.")
        low, high = self.times or (-inf, inf)
        if is_selected(self.steps, step, steps) and (time is None or low <= time <= high):
            self.included.add(step)
            return True
        chosen = [] if self.steps is None else [f"steps={describe(self.steps)}"]
        chosen += [] if self.times is None else ["times=({:g}, {:g})".format(*self.times)]
        self.missed = f"the run has {steps} steps, and none of them is in {' and '.join(chosen)}"
        return False

    def includes_pass(self, names: tuple[str, ...]) -> bool:
        """Whether any of a value's passes is selected; a value that both passes share always is."""
        if not names or self.passes in (None, "both", *names):
            return True
        self.missed = self.missed or f"there was no {self.passes} pass"
        return False

    def number_of_steps(self, count: int) -> int:
        """How many of ``count`` steps are selected; with times=, how many have been so far."""
        if self.times is not None:
            return len(self.included)
        return sum(is_selected(self.steps, step, count) for step in range(count))

    # ---------------------------------------------------------------- which part of a value

    def entries(
        self, value: Tensor | AttentionMap | Named, site: str, axes: Sequence[str], context: StepContext | None
    ) -> list[Indices]:
        """The selected entries as indices along some axes, once for each pass if words differ; empty if there are none.

        ``[{"head": [2], "key": [1, 5]}]``: of head 2, the keys 1 and 5, and all along the other axes.
        """
        names = passes_of(site, axes, value.shape[0], context)
        if not self.includes_pass(names):
            return []
        chosen = [name for name in dict.fromkeys(names) if self.passes in (name, "both", None)]
        chosen = chosen or [self.passes if self.passes in PASSES else "prompted"]  # for what both passes share
        if not self.has_words and len(chosen) == len(set(names)):
            names, chosen = (), chosen[:1]  # the same entries of all passes
        found, missing = [], None
        for name in chosen:
            rows = [i for i, one in enumerate(names) if one == name]
            try:
                indices = self._along(value, site, axes, context, name == "negative")
            except WordNotInPrompt as error:  # the prompt of the other pass may contain it
                missing = error
                continue
            if indices is not None:
                found.append(indices | ({"batch": rows} if len(rows) < len(names) else {}))
        if missing is not None and not found:
            raise missing
        return found

    def _along(self, value, site: str, axes: Sequence[str], context, negative: bool) -> Indices | None:
        """The selected heads, tokens and queries as indices along axes; None if the value is of another stream."""
        sizes, stream, found = dict(zip(axes, value.shape, strict=False)), stream_of(site, axes), {}
        if self.streams is not None and stream is not None and stream not in self.streams:
            self.missed = self.missed or f"they have no tokens of streams={describe(self.streams)}"
            return None
        txt_len = value.txt_len if isinstance(value, AttentionMap) else context and context.txt_len

        def find(axis: str | None, tokens: list[Token], streams: tuple[str, ...] | None) -> list[int]:
            if axis not in sizes:
                name = "queries" if axis == "query" else "tokens"
                raise InstrumentError(f"{site!r} has no {name} (its axes are {', '.join(axes) or 'unknown'}).")
            texts = {"txt": sizes[axis], "img": 0}.get(stream, txt_len)
            return TokenAxis(site, sizes[axis], texts, context, negative).find(tokens, streams)

        if self.heads is not None:
            if "head" not in sizes:
                raise InstrumentError(f"{site!r} has no axis 'head' (its axes are {', '.join(axes) or 'unknown'}).")
            for head in self.heads:
                if not -sizes["head"] <= head < sizes["head"]:
                    raise InstrumentError(f"{site!r} has {sizes['head']} heads, so there is no head {head}.")
            found["head"] = [head % sizes["head"] for head in self.heads]
        axis = next((axis for axis in TOKEN_AXES if axis in sizes), None)
        if self.tokens is not None:
            found[axis] = find(axis, self.tokens, self.streams)
        elif self.streams is not None and stream is None:
            found[axis] = find(axis, list(self.streams), None)
        if self.queries is not None:
            found["query"] = find("query", self.queries, None)
        elif self.image_queries and self.tokens is not None and axis == "key" and stream is None and txt_len:
            found["query"] = list(range(txt_len, sizes["query"]))
        return found

    def part(self, value: Named | AttentionMap, site: str) -> Value | None:
        """The selected pass, heads, tokens and queries of a value; None if there are none."""
        context, axes = current_context(), MAP_AXES if isinstance(value, AttentionMap) else value.axes
        entries = self.entries(value, site, axes, context)
        if not entries:
            return None
        if len(entries) > 1:
            raise InstrumentError("words are of one prompt: record passes='prompted' and passes='negative' separately.")
        (indices,), labels = entries, None
        if self.tokens is not None and "key" in indices and context is not None:
            pieces = tokenizer_at(context, site).pieces(prompt_at(context, self.passes == "negative"))
            texts = value.shape[-1] if stream_of(site, axes) == "txt" else context.txt_len
            labels = [_label(i, pieces, texts) for i in indices["key"]]
        if isinstance(value, AttentionMap):
            value = value.picture(indices["batch"][0]) if "batch" in indices else value
            queries = _as_slice(indices["query"]) if "query" in indices else slice(None)
            return MapView(value, indices.get("head"), queries, indices.get("key"), labels, self.map_budget)
        for axis, chosen in indices.items():
            value = value.take(axis, chosen)
        return value if labels is None else Named(value.tensor, value.axes, {"key": labels})


def mask_of(entries: list[Indices], axes: Sequence[str], value: Tensor | AttentionMap) -> Tensor | None:
    """True at the selected entries, of the smallest shape that broadcasts to the value's; None if all are selected."""
    if {} in entries:
        return None
    device = value.q.device if isinstance(value, AttentionMap) else value.device
    total = torch.zeros([1] * len(value.shape), dtype=torch.bool, device=device)
    for indices in entries:
        mask = torch.ones_like(total)
        for axis, chosen in indices.items():
            mask = mask & mask_along(axes.index(axis), chosen, value.shape, device)
        total = total | mask
    return total


def mask_along(axis: int, chosen: list[int] | None, shape: Sequence[int], device: torch.device) -> Tensor:
    """True at the chosen indices of one axis; a single True for None."""
    mask = torch.ones(1 if chosen is None else shape[axis], dtype=torch.bool, device=device)
    if chosen is not None:
        mask[:] = False
        mask[chosen] = True
    return mask.view([-1 if i == axis else 1 for i in range(len(shape))])


@dataclass(frozen=True)
class TokenAxis:
    """The tokens along an axis of length ``count``: first ``txt_len`` text tokens, then image tokens."""

    site: str
    count: int
    txt_len: int | None  # None: not known, since no pipeline runs
    context: StepContext | None
    negative: bool  # whether words are those of the negative prompt

    def stream(self, name: str) -> range:
        if self.txt_len is None:
            raise InstrumentError(
                f"at {self.site!r}, streams are known only while a pipeline runs; use indices instead."
            )
        return range(self.txt_len) if name == "txt" else range(self.txt_len, self.count)

    def find(self, tokens: list[Token], streams: tuple[str, ...] | None) -> list[int]:
        """Indices of words, regions, streams, and of numbers, which count the tokens of ``streams`` if that is one."""
        numbered = self.stream(streams[0]) if streams is not None and len(streams) == 1 else range(self.count)
        found: list[int] = []
        for token in tokens:
            if isinstance(token, Region):
                found += self._in_region(token)
            elif token in STREAMS:
                found += self.stream(token)
            elif isinstance(token, str):
                if self.context is None or self.txt_len:  # without a pipeline, the error says that it is needed
                    found += token_indices_at(self.context, self.site, [token], self.negative)
            elif 0 <= token < len(numbered):
                found.append(numbered[token])
            else:
                raise InstrumentError(f"{self.site!r} has {len(numbered)} tokens, so there is no token {token}.")
        allowed = range(self.count) if streams is None else {i for name in streams for i in self.stream(name)}
        found = [i for i in dict.fromkeys(found) if i in allowed]
        if not found:
            kind = "text" if all(isinstance(token, str) for token in tokens) else "image"
            raise InstrumentError(f"{self.site!r} has no {kind} tokens that are in {_shown(tokens, streams)}.")
        return found

    def _in_region(self, region: Region) -> list[int]:
        if self.context is None:
            raise InstrumentError(f"at {self.site!r}, the size of the image is known only while a pipeline runs.")
        shape = self.context.request.shape
        images = self.stream("img")
        if len(images) < shape[0] * shape[1] // PATCH**2 or self.site.startswith("ae."):
            return []  # a site of the text
        found = region.tokens(shape)
        if not found:
            raise InstrumentError(
                f"the region contains no image token; the image has {shape[0] // 2} x {shape[1] // 2}."
            )
        return [images[i] for i in found]


def _shown(tokens: list[Token], streams: tuple[str, ...] | None) -> str:
    words = ", ".join("a region" if isinstance(token, Region) else repr(token) for token in tokens)
    return f"tokens={words}" + (f" and streams={describe(streams)}" if streams else "")


def _label(index: int, pieces: list[str], txt_len: int) -> str:
    if index >= txt_len:
        return f"patch {index - txt_len}"
    return pieces[index] if index < len(pieces) else "<pad>"


def _as_slice(indices: list[int]) -> slice | list[int]:
    """The same indices as a slice where they follow each other, so that no copy is made."""
    whole = range(indices[0], indices[-1] + 1)
    return slice(whole.start, whole.stop) if list(whole) == indices else indices
