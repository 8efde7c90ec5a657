"""The model card, written from what was measured: the last stage of ``fluxedu train --all``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fluxedu.checkpoints.save import write_text
from fluxedu.files import folder_lock
from fluxedu.loading import LORAS, SHIPPED, load
from fluxedu.nano.report import BARS, ROWS, examine, table
from fluxedu.nano.scenes import ASPECTS, BACKGROUNDS, COLORS, LETTERS, SHAPES
from fluxedu.nano.training import autoencoder, clip, flow, t5
from fluxedu.nano.training.loop import Recipe, told_by

RUNS = {
    "autoencoder": (autoencoder.RECIPE, autoencoder.SEED, "windows of scenes"),
    "t5": (t5.RECIPE, t5.SEED, "captions"),
    "clip": (clip.RECIPE, clip.SEED, "pictures with captions"),
    "flow": (flow.RECIPE, flow.SEED, "latents with captions"),
    "flow-dev": (flow.DISTILL, flow.SEED + 1, "latents with captions"),
}

TEXT = """---
license: apache-2.0
library_name: fluxedu
pipeline_tag: text-to-image
---

# The miniature FLUX

Every part of FLUX.1 in small, trained by this project from nothing: tokenizers, CLIP, T5 encoder,
autoencoder and two flow transformers. The folder has the official repositories' layout; `fluxedu.load()`
opens it, and so does diffusers' `FluxPipeline.from_pretrained`.

| folder | what it is |
|---|---|
| `transformer` | the flow with guidance as an input, as FLUX.1-dev: `fluxedu.load("nano")` |
| `transformer_base` | the flow before distillation, for classifier-free guidance: `fluxedu.load("nano-base")` |
| `text_encoder`, `text_encoder_2`, `tokenizer`, `tokenizer_2` | CLIP and T5 |
| `image_tower` | CLIP's other half, for retrieval; FLUX does not use it |
| `vae` | the autoencoder |
| `transformer_fill`, `transformer_kontext` | members with a flow of their own: `fluxedu.load("nano-fill")` |
| `lora_canny`, `lora_depth` | members that are a LoRA on `transformer`: `fluxedu.load("nano-canny")` |
| `redux` | the eye and the head that say a picture in T5's words: `fluxedu.load("nano-redux")` |
| `lora_hollow` | a style: `fluxedu.load("nano", lora="hollow")` |

## Data

Procedural scenes (`fluxedu/nano/scenes.py`), no pictures of the world: {shapes} and the letters
{letters}, in {colors} colours on {backgrounds} backgrounds, one to three things left of, right of, above
or below each other, {aspects} picture shapes from 1:2 to 2:1. A tenth of all (colour, form, background)
is never seen in training; every prompt of the exam below was written from a scene that has one.

## Training

{runs}

T5's encoder learned from captions alone, by span denoising, rewriting captions as lists of facts, and
tagging; its decoder and tagger were dropped. The flow learned from {scenes:,} scenes, kept as latents, with
{dropout:.0f} % of the captions left empty. A linear head that names what lies in each patch (the alignment
of REPA, arXiv 2410.06940) helped it and was dropped before the end. The second flow learned from the first
one's guided velocities for strengths {low:g} to {high:g}. {history}

## Figures

The judge (`fluxedu judge`), {prompts} held-out prompts, {steps} steps, guidance {guidance}; in
percent, beside the bar that was set before training. Guidance and shift were chosen on other prompts.

{table}

Autoencoder {psnr:.1f} dB on held-out scenes. CLIP finds a held-out picture's caption among 64 in
{retrieval:.1f} % of cases.

Everything right by picture shape, height x width, over {for_shapes:,} prompts, which begin with the {prompts}:

{by_size}

{family}{last}

{failures}
"""

FAMILY_TITLE, ARENA_TITLE = "## The family", "## In the arena"
RIVALS_TITLE, LAST_TITLE = "## Beside a Stable Diffusion", "## Known failures"
APART = 5  # points between square pictures and others, at most
FOR_SHAPES = 2100  # prompts, 300 for each shape of picture: of 500 a gap of 5 points is no more than chance
AGAIN = "`fluxedu train --all` made all of it, in one piece."


def hours(folder: Path) -> str:
    """The table of runs: steps, batch, seed, minutes, from the recipes and the runs' own clocks."""
    lines = ["| run | steps | batch | of | seed | minutes |", "|---|---|---|---|---|---|"]
    for name, (recipe, seed, of) in RUNS.items():
        steps, minutes = clock(folder, name, recipe)
        lines.append(f"| {name} | {steps} | {recipe.batch} | {of} | {seed} | {minutes:.0f} |")
    return "\n".join(lines)


def clock(folder: Path, name: str, recipe: Recipe) -> tuple[int, float]:
    """Steps and minutes of a run, by its own clock."""
    told = told_by(Path(folder) / name / "state.safetensors")
    return min(int(told["step"]), recipe.steps), float(told["seconds"]) / 60


def rows_table(figures: dict[str, dict]) -> str:
    """The judge's rows, a column a model."""
    lines = [f"| | bar | {' | '.join(figures)} |", "|---" * (2 + len(figures)) + "|"]
    for row in ROWS:
        cells = [f"{table['rows'][row]['percent']:.1f}" for table in figures.values()]
        lines.append(f"| {row} | {BARS.get(row, '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes_table(figures: dict[str, dict]) -> str:
    """Everything right, a row a model, a column a shape of picture."""
    sizes = list(next(iter(figures.values()))["more_by_size"])
    lines = [f"| | {' | '.join(sizes)} |", "|---" * (1 + len(sizes)) + "|"]
    for name, of in figures.items():
        lines.append(f"| {name} | {' | '.join(format(of['more_by_size'][size]['percent'], '.0f') for size in sizes)} |")
    return "\n".join(lines)


def shapes_apart(by_size: dict[str, dict]) -> tuple[float, float]:
    """Everything right, in percent: of square pictures, and of all others."""
    percent = {"square": [], "others": []}
    for size, cell in by_size.items():
        height, width = size.split("x")
        percent["square" if height == width else "others"] += [cell["percent"]] * cell["n"]
    return tuple(sum(each) / len(each) for each in percent.values())


def failures(figures: dict[str, dict]) -> str:
    """The weakest rows and every bar that was missed, a sentence or two a model."""
    said = []
    for name, of in figures.items():
        share = {row: of["rows"][row]["percent"] for row in ROWS}
        worst = sorted((share[row], row) for row in ROWS if row != "everything")[:3]
        missed = [f"{row} ({share[row]:.1f} %, bar {bar})" for row, bar in BARS.items() if share[row] < bar]
        said.append(f"{name}: weakest in " + ", ".join(f"{row} ({p:.1f} %)" for p, row in worst) + ".")
        said[-1] += f" Below its bar: {', '.join(missed)}." if missed else " No bar missed."
        square, others = shapes_apart(of["more_by_size"])
        said[-1] += f" Squares are right in {square:.1f} %, other shapes in {others:.1f} % (bar: {APART} points apart;"
        said[-1] += " of the first {} prompts {:.0f} and {:.0f}).".format(of["prompts"], *shapes_apart(of["by_size"]))
    return "\n".join([*said, "Words outside its world mean nothing to either."])


def called(name: str) -> str:
    """How a member is asked for: by a name of its own, or a style with the miniature."""
    return f'`load("nano", lora="{name}")`' if name in LORAS else f"`nano-{name}`"


def family_table(weights: Path) -> str:
    """The members that ship beside, from ``family.json``: figures, bars, cost. Empty where there are none."""
    path = Path(weights) / "family.json"
    if not path.is_file():
        return ""
    lines = [
        FAMILY_TITLE,
        "",
        "`fluxedu train --variant NAME` from the miniature; the exam is `fluxedu/nano/family.py`, on held-out scenes.",
        "",
        "| member | figures (bar) | guidance | scenes judged | steps x batch | minutes |",
        "|---|---|---|---|---|---|",
    ]
    members = json.loads(path.read_text())
    for name, of in members.items():
        said = [f"{row} {of['figures'][row]:.1f} ({bar})" for row, bar in of["bars"].items()]
        cells = [", ".join(said), of["guidance"], of["scenes"], f"{of['steps']} x {of['batch']}", of["minutes"]]
        lines.append(f"| {called(name)} | {' | '.join(map(str, cells))} |")
    lines += [""] + [f"{called(name)}: {of['history']}" for name, of in members.items() if "history" in of]
    return "\n".join([*lines, "", ""])


def write_member(weights: Path, name: str, entry: dict, file: str = "family.json") -> None:
    """Note a member of the family in ``file``, and in the model card where there is one."""
    weights, card = Path(weights), Path(weights) / "README.md"
    path = weights / file
    weights.mkdir(parents=True, exist_ok=True)
    with folder_lock(weights):  # two that train at once each add their own
        members = json.loads(path.read_text()) if path.is_file() else {}
        write_text(path, json.dumps(dict(sorted({**members, name: entry}.items())), indent=2) + "\n")
        if card.is_file():
            refresh(card)


def refresh(card: Path) -> None:
    """Write the card's sections on family, arena and rivals again, from the figures beside it."""
    before = end = card.read_text()
    for title in (FAMILY_TITLE, ARENA_TITLE, RIVALS_TITLE, LAST_TITLE):
        before = before.split(title)[0]
    write_text(card, before + beside(card.parent) + end[end.index(LAST_TITLE) :])


def beside(weights: Path) -> str:
    """The sections that have figures of their own in ``weights``."""
    return family_table(weights) + arena_table(weights) + rivals_table(weights)


def arena_table(weights: Path) -> str:
    """The ratings in ``arena.json``, as ``fluxedu arena table --json`` writes them. Empty where there are none."""
    path = Path(weights) / "arena.json"
    if not path.is_file():
        return ""
    axes = json.loads(path.read_text())
    first = next(iter(axes.values()))
    votes = sum(row["votes"] for table in axes.values() for row in table.values()) // 2
    lines = [
        ARENA_TITLE,
        "",
        f"Elo and its 95 % interval, {votes} votes of the judge on pairs of pictures: `fluxedu arena run "
        f"{' '.join(sorted(first))} --count {votes}`. Intervals that overlap say that the votes do not tell two apart.",
        "",
        f"| | {' | '.join(axes)} |",
        "|---" * (1 + len(axes)) + "|",
    ]
    for name in first:
        rated = [table.get(name) for table in axes.values()]
        cells = [f"{r['elo']:.0f} ({r['low']:.0f} to {r['high']:.0f})" if r else "" for r in rated]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", ""])


def rivals_table(weights: Path) -> str:
    """Two rivals on one budget, from ``rivals.json`` as ``fluxedu train --variant sd`` and ``twin`` write it."""
    path = Path(weights) / "rivals.json"
    if not path.is_file():
        return ""
    rivals = json.loads(path.read_text())
    share = lambda cell: f"{cell['percent']:.1f}" if cell["n"] else ""  # noqa: E731
    rows = {
        "parameters": lambda of: f"{of['parameters']:,}",
        "minutes of one core": lambda of: of["minutes"],
        "steps x batch": lambda of: f"{of['steps']} x {of['batch']}",
        **{row: lambda of, row=row: share(of["exam"]["rows"][row]) for row in ROWS},
        "squares, other shapes": lambda of: "{:.0f}, {:.0f}".format(*shapes_apart(of["exam"]["by_size"])),
        "how clean": lambda of: format(of["exam"]["quality"], ".3f"),
        "diversity": lambda of: format(of["exam"]["diversity"], ".3f"),
    }
    for steps in next(iter(rivals.values()))["by_steps"]:
        rows[f"everything, {steps} steps"] = lambda of, steps=steps: share(of["by_steps"][steps])
    first = next(iter(rivals.values()))
    lines = [
        RIVALS_TITLE,
        "",
        "Both from nothing, with the same scenes, encoders, autoencoder, optimizer and minutes; neither is the "
        "miniature, which learned for far longer. `sd`: diffusers' U-Net, noise prediction, DDIM. `twin`: the "
        f"miniature's flow. Judged on {first['exam']['prompts']} held-out prompts in 20 steps with guidance "
        f"{first['guidance']:g}, two questions a step; other numbers of steps on the first {first['few']}. `sd` ships "
        "(`fluxedu judge --model sd`), the twin does not: `fluxedu train --variant twin` makes it.",
        "",
        f"| | {' | '.join(rivals)} |",
        "|---" * (1 + len(rivals)) + "|",
        *(f"| {row} | {' | '.join(str(of(each)) for each in rivals.values())} |" for row, of in rows.items()),
    ]
    return "\n".join([*lines, "", ""])


def judged(weights: Path, say: Callable[[str], None] = print) -> dict[str, dict]:
    """Both models through the exam."""
    figures = {}
    for name, ours in SHIPPED.items():
        pipe = load(Path(weights).resolve(), transformer=ours.transformer)
        figures[name] = examine(pipe, name, for_shapes=FOR_SHAPES)
        say(table(figures[name]))
    return figures


def write_card(
    weights: Path, figures: dict[str, dict], runs: str, scenes: int, retrieval: float, history: str = AGAIN
) -> None:
    """Write ``judge.json`` and ``README.md`` beside the weights.

    ``figures`` as :func:`judged` gives them · ``runs`` as :func:`hours` does · ``scenes`` the flow learned
    from · ``retrieval`` of CLIP, a share · ``history``: what else has to be said of how these weights came about.
    """
    first = next(iter(figures.values()))
    strengths = " and ".join(f"{of['guidance']:g} ({name})" for name, of in figures.items())
    text = TEXT.format(
        shapes=", ".join(SHAPES), letters=", ".join(LETTERS), colors=len(COLORS), backgrounds=len(BACKGROUNDS),
        aspects=len(ASPECTS), runs=runs, scenes=scenes, history=history,
        dropout=100 * flow.DROPOUT, low=flow.GUIDANCE[0], high=flow.GUIDANCE[1], prompts=first["prompts"],
        steps=first["steps"], guidance=strengths, table=rows_table(figures), psnr=first["autoencoder_psnr"],
        retrieval=100 * retrieval, failures=failures(figures), by_size=sizes_table(figures),
        for_shapes=FOR_SHAPES, family=beside(weights),
        last=LAST_TITLE,
    )  # fmt: skip
    write_text(weights / "judge.json", json.dumps(figures, indent=2) + "\n")
    write_text(weights / "README.md", text)
