"""What a sweep is: prompts x seeds x interventions, read strictly from a YAML file.

    prompts: [a red circle left of a blue square, a green triangle]
    seeds: [0, 1, 2]                            # or {from: 0, count: 100}
    interventions:                              # a name each; left out, one that changes nothing
      as it is: []
      no head 2: {ablate: double.1.heads, heads: [2]}
      half gates: {scale: single.*.gate, by: 0.5, times: [0.5, 1.0]}
      from blue: {patch: double.1.img_contribution, from: {prompt: a blue circle, seed: 0}}
    settings: {steps: 8, guidance: 4.0}         # of the pipeline
    keep: [image, latent]                       # or trajectory
    record: [{sites: "double.*.attn.map", reduce: head-mean, tokens: [red]}]
    lens: {contributions: {}, head_gallery: {query: red, at_step: 0}}   # by name, see fluxedu/sweep/lens.py

Also ``model``, ``device`` and ``dtype`` (the model's own if left out, as :func:`fluxedu.load` chooses), ``shard``
(cells a file, 8) and ``threads`` (of a CPU process, 1: another number rounds differently). A cell is one prompt, one
seed, one intervention, and has a number: prompts count slowest, interventions fastest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fluxedu.errors import InstrumentError, SweepError, describe
from fluxedu.sweep.changes import checked_changes, checked_record
from fluxedu.sweep.lens import checked_lenses
from fluxedu.sweep.strict import numbers, only, text, texts, whole
from fluxedu.sweep.yaml_file import read_yaml

MOST_CELLS = 1_000_000
KEPT = ("image", "latent", "trajectory")
SETTINGS = ("steps", "guidance", "height", "width", "solver", "negative_prompt", "true_cfg_scale", "guidance_interval")
_KEYS = ("prompts", "seeds", "interventions", "settings", "keep", "record", "lens", "model", "device", "dtype")
_KEYS += ("shard", "threads")


@dataclass(frozen=True)
class Cell:
    """One picture to draw; ``number`` counts from 0."""

    number: int
    prompt: str
    seed: int
    intervention: str


@dataclass(frozen=True)
class Sweep:
    """A sweep, checked; see this module's head for what the fields mean."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    interventions: dict[str, list[dict]] = field(default_factory=lambda: {"as it is": []})
    settings: dict = field(default_factory=dict)
    keep: tuple[str, ...] = ("image", "latent")
    record: tuple[dict, ...] = ()
    lens: dict[str, dict] = field(default_factory=dict)
    model: str = "nano"
    device: str | None = None
    dtype: str | None = None
    shard: int = 8
    threads: int = 1

    def __len__(self) -> int:
        return len(self.prompts) * len(self.seeds) * len(self.interventions)

    def cell(self, number: int) -> Cell:
        rest, change = divmod(number, len(self.interventions))
        prompt, seed = divmod(rest, len(self.seeds))
        return Cell(number, self.prompts[prompt], self.seeds[seed], list(self.interventions)[change])

    @property
    def shards(self) -> range:
        """The numbers of the files; each is a unit of work, written once and whole."""
        return range(-(-len(self) // self.shard))

    def cells(self, shard: int) -> list[Cell]:
        """The cells of one file."""
        first = shard * self.shard
        return [self.cell(number) for number in range(first, min(first + self.shard, len(self)))]

    def to_dict(self) -> dict:
        """Plain values, fit for JSON; :func:`from_dict` reads them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


def read_config(path: str | Path) -> Sweep:
    """The sweep that a YAML file describes; raises SweepError, one sentence, for anything that it does not know."""
    try:
        return from_dict(read_yaml(Path(path)))
    except (SweepError, InstrumentError) as error:
        raise SweepError(f"{Path(path).name}: {error}") from None


def from_dict(values: dict) -> Sweep:
    """A sweep from plain values, strictly."""
    only(values, _KEYS, "a sweep", needed=("prompts",))
    given = {
        "prompts": lambda v: _different(texts(v, "prompts", empty=True), "prompts"),
        "seeds": _seeds,
        "interventions": _interventions,
        "settings": _settings,
        "keep": _keep,
        "record": lambda v: tuple(checked_record(r) for r in _list(v, "record")),
        "lens": checked_lenses,
        "model": lambda v: text(v, "model"),
        "device": lambda v: v if v is None else text(v, "device"),
        "dtype": lambda v: v if v is None else text(v, "dtype"),
        "shard": lambda v: whole(v, "shard", 1, 10_000),
        "threads": lambda v: whole(v, "threads", 1, 1024),
    }
    sweep = Sweep(**{key: given[key](value) for key, value in values.items()})
    if len(sweep) > MOST_CELLS:
        raise SweepError(f"prompts x seeds x interventions are {len(sweep):,} cells; {MOST_CELLS:,} is the most.")
    return sweep


def _list(value, name: str) -> list:
    if not isinstance(value, list):
        raise SweepError(f"{name} is a list, not {describe(value)}.")
    return value


def _different(items: Iterable, name: str) -> tuple:
    items = tuple(items)
    if len(set(items)) < len(items):
        twice = next(item for item in items if items.count(item) > 1)
        raise SweepError(f"{name} has {describe(twice)} twice.")
    return items


def _seeds(value) -> tuple[int, ...]:
    if isinstance(value, dict):
        only(value, ("from", "count"), "seeds", needed=("from", "count"))
        count = whole(value["count"], "seeds' count", 1, MOST_CELLS)
        first = whole(value["from"], "seeds' from", 0, 2**63 - count)
        return tuple(range(first, first + count))
    seeds = numbers(value, "seeds")
    return _different((whole(seed, "a seed", 0, 2**63 - 1) for seed in seeds), "seeds")


def _interventions(value) -> dict[str, list[dict]]:
    if not isinstance(value, dict) or not value:
        raise SweepError(f"interventions is a name each with what it changes ([] for nothing), not {describe(value)}.")
    return {text(name, "an intervention's name"): checked_changes(changes, name) for name, changes in value.items()}


def _settings(value) -> dict:
    """The pipeline's own arguments; their values it checks itself, with its own sentences."""
    only(value, SETTINGS, "settings")
    for name, given in value.items():
        plain = given is None or isinstance(given, (int, float, str))
        if not plain and not (isinstance(given, list) and all(isinstance(g, (int, float)) for g in given)):
            raise SweepError(f"settings' {name} is a number or a word, not {describe(given)}.")
    return dict(value)


def _keep(value) -> tuple[str, ...]:
    kept = _different(texts(value, "keep"), "keep")
    for name in kept:
        if name not in KEPT:
            raise SweepError(f"keep has {describe(name)}; what can be kept is {', '.join(KEPT)}.")
    return kept
