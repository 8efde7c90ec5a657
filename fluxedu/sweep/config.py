"""The description of a sweep, read strictly from a YAML file.

    prompts: [a red circle left of a blue square, a green triangle]
    seeds: [0, 1, 2]                            # or {from: 0, count: 100}
    interventions:                              # name: a change or a list of changes; [] changes nothing
      unchanged: []
      no head 2: {ablate: double.1.heads, heads: [2]}
      half gates: {scale: single.*.gate, by: 0.5, times: [0.5, 1.0]}
      from blue: {patch: double.1.img_contribution, from: {prompt: a blue circle, seed: 0}}
    settings: {steps: 8, guidance: 4.0}         # arguments of the pipeline
    keep: [image, latent]                       # or trajectory
    record: [{sites: "double.*.attn.map", reduce: head-mean, tokens: [red]}]    # arguments of fluxedu.record
    lens: {contributions: {}, head_gallery: {query: red, at_step: 0}}           # of fluxedu.instruments.lenses

``model``, ``device``, ``dtype``, ``like``, ``variant`` and ``revision`` go to :func:`fluxedu.load`, which chooses what
is left out. ``shard`` is the number of cells per file (8), ``threads`` that of CPU threads per process (1; another
number rounds differently).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import fluxedu as fe
from fluxedu import errors
from fluxedu.errors import SweepError, checked, describe
from fluxedu.files import read_yaml
from fluxedu.instruments.lenses.run import SINGLE_RUN_LENSES

MOST_CELLS = 1_000_000
MOST_CHANGES = 1000  # in one intervention: 2 seconds per image
COLUMNS = ("number", "prompt", "seed", "intervention", "file")
SETTINGS = ("steps", "guidance", "height", "width", "solver", "negative_prompt", "true_cfg_scale", "guidance_interval")
SELECTION = ("heads", "streams", "tokens", "queries", "passes", "steps", "times")


@dataclass(frozen=True)
class Sweep:
    """A validated description. From cell to cell, the intervention changes first and the prompt last."""

    prompts: list[str]
    seeds: list[int] = field(default_factory=lambda: [0])
    interventions: dict = field(default_factory=lambda: {"unchanged": []})
    settings: dict = field(default_factory=dict)
    keep: list[str] = field(default_factory=lambda: ["image", "latent"])
    record: list[dict] = field(default_factory=list)
    lens: dict = field(default_factory=dict)
    model: str = "nano"
    device: str | None = None
    dtype: str | None = None
    like: str | None = None
    variant: str | None = None
    revision: str | None = None
    shard: int = 8
    threads: int = 1

    def __len__(self) -> int:
        return len(self.prompts) * len(self.seeds) * len(self.interventions)

    def cell(self, number: int) -> dict:
        """One row of the table: an image, counted from 0, and the file that holds it."""
        errors.check_integer("the number of a cell", number, 0, len(self) - 1, error=SweepError)
        rest, intervention = divmod(number, len(self.interventions))
        prompt, seed = divmod(rest, len(self.seeds))
        row = (number, self.prompts[prompt], self.seeds[seed], list(self.interventions)[intervention])
        return dict(zip(COLUMNS, (*row, f"shards/{number // self.shard:05d}.safetensors"), strict=True))

    def cells(self, file: int | None = None) -> list[dict]:
        """All cells, or those of one file. A file is the unit of work."""
        if file is not None:
            errors.check_integer("the number of a file", file, 0, len(self) // self.shard, error=SweepError)
        first, last = (0, len(self)) if file is None else (file * self.shard, (file + 1) * self.shard)
        return [self.cell(number) for number in range(first, min(last, len(self)))]

    def files(self) -> list[str]:
        return [self.cell(number)["file"] for number in range(0, len(self), self.shard)]


@checked(SweepError)
def read_config(path: str | Path) -> Sweep:
    """The sweep that a YAML file describes; raises SweepError, one sentence, for anything unknown or malformed."""
    try:
        return from_dict(read_yaml(path))
    except ValueError as error:
        raise SweepError(f"{Path(path).name}: {error}") from None


def from_dict(values: dict) -> Sweep:
    """The sweep that a dictionary with the keys of the YAML file describes; raises FluxeduError."""
    errors.check_keys("a sweep", values, [f.name for f in fields(Sweep)], ["prompts"])
    seeds = values.get("seeds", [0])
    if isinstance(seeds, dict):
        errors.check_keys("seeds", seeds, ["from", "count"], ["from", "count"])
        count = errors.check_integer("the count of seeds", seeds["count"], 1, MOST_CELLS)
        first = errors.check_integer("the first seed", seeds["from"], 0, 2**63 - count)
        seeds = list(range(first, first + count))
    sweep = Sweep(**{**values, "seeds": seeds})
    for prompt in errors.check_list("prompts", sweep.prompts):
        errors.check_text("a prompt", prompt)
    for seed in errors.check_list("seeds", sweep.seeds):
        errors.check_integer("a seed", seed, 0, 2**63 - 1)
    for output in errors.check_list("keep", sweep.keep):
        errors.check_choice("an item of keep", output, ("image", "latent", "trajectory"))
    errors.check_keys("settings", sweep.settings, SETTINGS)  # the pipeline checks their values
    for name in ("model", "device", "dtype", "like", "variant", "revision"):
        if name == "model" or getattr(sweep, name) is not None:
            errors.check_text(name, getattr(sweep, name))
    errors.check_integer("shard", sweep.shard, 1, 10_000)
    errors.check_integer("threads", sweep.threads, 1, 1024)
    for name, changes in errors.check_keys("interventions", sweep.interventions).items():
        errors.check_text("the name of an intervention", name)
        make_interventions(name, changes)
    make_recorders(sweep.record)
    errors.check_keys("lens", sweep.lens, SINGLE_RUN_LENSES)  # all of them share one run
    for name, arguments in sweep.lens.items():  # the lens itself checks the values, when it has a model and a prompt
        parameters = inspect.signature(SINGLE_RUN_LENSES[name]).parameters
        options = {o: p for o, p in parameters.items() if o not in ("pipe", "prompt")}
        required = [option for option, parameter in options.items() if parameter.default is parameter.empty]
        errors.check_keys(f"lens {name}", arguments, options, required)
    if not 1 <= len(sweep) <= MOST_CELLS:
        raise SweepError(f"prompts x seeds x interventions are {len(sweep):,} cells; {MOST_CELLS:,} is the maximum.")
    return sweep


def make_interventions(name: str, changes, record_run: Callable | None = None) -> list[fe.intervene]:
    """The context managers of an intervention. A patch copies from ``record_run(site, prompt, seed)``, if given."""
    made = []
    if isinstance(changes, list) and len(changes) > MOST_CHANGES:
        raise SweepError(f"{describe(name)} has {len(changes):,} changes; {MOST_CHANGES:,} is the maximum.")
    for change in changes if isinstance(changes, list) else [changes]:
        match change:
            case {"ablate": sites, **options}:
                errors.check_keys(f"ablate in {describe(name)}", options, (*SELECTION, "to"))
                made.append(fe.ablate(*_globs(sites), **options))
            case {"scale": sites, "by": factor, **options}:
                errors.check_keys(f"scale in {describe(name)}", options, SELECTION)
                errors.check_number("by", factor, -1e30, 1e30, "YAML reads 1.0e-3 as a number, 1e-3 as text")
                made.append(fe.intervene(*_globs(sites), partial(_scaled, factor=factor), **options))
            case {"patch": str(site) | [str(site)], "from": {"prompt": str(prompt), "seed": seed}, **options}:
                errors.check_keys(f"patch in {describe(name)}", options, SELECTION)
                errors.check_keys("from", change["from"], ("prompt", "seed"))
                errors.check_integer("the seed of from", seed, 0, 2**63 - 1)
                checked = fe.intervene(site, _scaled, **options)
                made.append(fe.patch(site, record_run(site, prompt, seed), **options) if record_run else checked)
            case _:
                forms = "{ablate: SITES}, {scale: SITES, by: FACTOR} or {patch: SITE, from: {prompt: TEXT, seed: SEED}}"
                raise SweepError(f"{describe(name)} has a change that is not {forms}: {describe(change)}.")
    return made


def _scaled(value, ctx, factor: float = 1.0):
    if not hasattr(value, "is_complex"):
        raise SweepError(f"{ctx.site!r} is not a plain tensor, so it cannot be scaled.")
    return value * factor


def make_recorders(entries) -> list[fe.record]:
    """New recorders for the entries of ``record``."""
    for entry in errors.check_list("record", entries, least=0):
        errors.check_keys("record", entry, ("sites", "steps", "tokens", "heads", "reduce", "passes"), ["sites"])
    return [fe.record(*_globs(entry["sites"]), **{k: v for k, v in entry.items() if k != "sites"}) for entry in entries]


def _globs(value) -> list[str]:
    return errors.check_list("sites", [value] if isinstance(value, str) else value)
