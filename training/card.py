"""The model card, written from measured figures: the last stage of ``fluxedu train --all``.

The figures are in files beside the weights: ``judge.json`` (the exam), ``family.json``, ``arena.json`` and
``baselines.json``. Whenever an entry is added to one of them, the card's sections on the last three are written again.
Those of FLUX.2 are stored results of the course (evidence/flux2.py); ``python -m training.card`` writes its section.
"""

from __future__ import annotations

import json
from pathlib import Path

from fluxedu.course import evidence
from fluxedu.errors import CheckpointError, check_keys
from fluxedu.files import folder_lock, read_json_file, write_text
from fluxedu.loading import LORAS, SHIPPED, load
from fluxedu.nano.exam import ROWS, TARGETS, evaluate, format_table
from fluxedu.nano.scenes import ASPECTS, BACKGROUNDS, COLORS, LETTERS, SHAPES
from fluxedu.nano.shipped import SHIPPED_FLUX2, WEIGHTS
from training import autoencoder, clip, flow, t5
from training.files import read_file
from training.loop import Recipe

RUNS = {
    "autoencoder": (autoencoder.RECIPE, autoencoder.SEED, "crops of scenes"),
    "t5": (t5.RECIPE, t5.SEED, "captions"),
    "clip": (clip.RECIPE, clip.SEED, "images with captions"),
    "flow": (flow.RECIPE, flow.SEED, "latents with captions"),
    "flow-dev": (flow.DISTILL_RECIPE, flow.SEED + 1, "latents with captions"),
}

TEXT = """---
license: apache-2.0
library_name: fluxedu
pipeline_tag: text-to-image
---

# The miniature FLUX

Every part of FLUX.1 at a small size, trained from scratch by this project: tokenizers, CLIP, T5 encoder,
autoencoder and two flow transformers. The folder has the layout of the official repositories; `fluxedu.load()`
opens it, and so does diffusers' `FluxPipeline.from_pretrained`.

| folder | contents |
|---|---|
| `transformer` | the flow with guidance as an input, like FLUX.1-dev: `fluxedu.load("nano")` |
| `transformer_base` | the flow before distillation, for classifier-free guidance: `fluxedu.load("nano-base")` |
| `text_encoder`, `text_encoder_2`, `tokenizer`, `tokenizer_2` | CLIP and T5 |
| `image_tower` | CLIP's image tower, for retrieval; FLUX does not use it |
| `vae` | the autoencoder |
| `transformer_fill`, `transformer_kontext` | family members with a flow of their own: `fluxedu.load("nano-fill")` |
| `transformer_flux2` | FLUX.2 at the same size, with T5 in place of a language model: `fluxedu.load("nano-flux2")` |
| `lora_canny`, `lora_depth` | family members that are a LoRA on `transformer`: `fluxedu.load("nano-canny")` |
| `redux` | the vision encoder and the head that turn an image into T5-like tokens: `fluxedu.load("nano-redux")` |
| `lora_hollow` | a style: `fluxedu.load("nano", lora="hollow")` |

## Data

Procedural scenes (`fluxedu/nano/scenes.py`), no real images: {shapes} and the letters
{letters}, in {colors} colours on {backgrounds} backgrounds, one to three objects left of, right of, above
or below each other, in {aspects} image sizes from 1:2 to 2:1. A tenth of all combinations of colour, form and
background does not occur in training; every prompt of the exam below describes a scene that has one of them.

## Training

{runs}

T5's encoder was trained on captions alone, by span corruption, by rewriting captions as lists of facts, and by
tagging; its decoder and tagging head were dropped. The flow was trained on {scenes:,} scenes, stored as latents, with
{dropout:.0f} % of the captions replaced by the empty one. A linear head that predicts the object in each patch (the
alignment of REPA, arXiv 2410.06940) helped it and was dropped before the end. The second flow was distilled from the
first one's guided velocities at guidance scales from {low:g} to {high:g}. {history}

## Figures

The judge (`fluxedu judge`) on {prompts} held-out prompts, {steps} steps, guidance {guidance}; in
percent, beside the target that was set before training. Guidance and shift were chosen on other prompts.

{table}

Autoencoder {psnr:.1f} dB on held-out scenes. CLIP finds a held-out image's caption among 64 in
{retrieval:.1f} % of cases.

Everything right by image size, height x width, over {by_size_prompts:,} prompts, including the {prompts}:

{by_size}

{sections}{last}

{failures}
"""

FAMILY_TITLE, ARENA_TITLE = "## The family", "## In the arena"
BASELINES_TITLE, FLUX2_TITLE = "## Compared with a Stable Diffusion", "## FLUX.2 in miniature"
LAST_TITLE = "## Known failures"
MAX_GAP = 5  # points between square images and others
BY_SIZE_PROMPTS = 2100  # 300 for each image size: among 500 prompts, a gap of 5 points is no more than chance
ONE_RUN = "`fluxedu train --all` made all of it, in one run."


# ---------------------------------------------------------------- the exam's figures


def evaluate_all(weights: Path) -> dict[str, dict]:
    """The exam of both shipped models."""
    figures = {}
    for name, shipped in SHIPPED.items():
        pipe = load(Path(weights).resolve(), transformer=shipped.transformer)
        figures[name] = evaluate(pipe, name, by_size_prompts=BY_SIZE_PROMPTS)
        print(format_table(figures[name]))
    return figures


def steps_and_minutes(folder: Path, name: str, recipe: Recipe) -> tuple[int, float]:
    """Steps and minutes of a run, as recorded in its state."""
    metadata, _ = read_file(Path(folder) / name / "state.safetensors")
    return min(int(metadata["step"]), recipe.steps), float(metadata["seconds"]) / 60


def runs_table(folder: Path) -> str:
    """The table of training runs."""
    lines = ["| run | steps | batch | of | seed | minutes |", "|---|---|---|---|---|---|"]
    for name, (recipe, seed, of) in RUNS.items():
        steps, minutes = steps_and_minutes(folder, name, recipe)
        lines.append(f"| {name} | {steps} | {recipe.batch} | {of} | {seed} | {minutes:.0f} |")
    return "\n".join(lines)


def exam_table(figures: dict[str, dict]) -> str:
    """The judge's rows, one column per model."""
    lines = [f"| | target | {' | '.join(figures)} |", "|---" * (2 + len(figures)) + "|"]
    for row in ROWS:
        cells = [f"{exam['rows'][row]['percent']:.1f}" for exam in figures.values()]
        lines.append(f"| {row} | {TARGETS.get(row, '')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes_table(figures: dict[str, dict]) -> str:
    """The share with everything right, one row per model and one column per image size."""
    sizes = list(next(iter(figures.values()))["more_by_size"])
    lines = [f"| | {' | '.join(sizes)} |", "|---" * (1 + len(sizes)) + "|"]
    for name, exam in figures.items():
        cells = [f"{exam['more_by_size'][size]['percent']:.0f}" for size in sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def square_and_other(by_size: dict[str, dict]) -> tuple[float, float]:
    """Percent with everything right, over the square images and over all others."""
    square, other = [], []
    for size, cell in by_size.items():
        height, width = size.split("x")
        (square if height == width else other).extend([cell["percent"]] * cell["n"])
    return sum(square) / len(square), sum(other) / len(other)


def failures(figures: dict[str, dict]) -> str:
    """For each model its weakest rows, the targets it missed, and the gap between image sizes."""
    lines = []
    for name, exam in figures.items():
        percent = {row: exam["rows"][row]["percent"] for row in ROWS}
        weakest = sorted((percent[row], row) for row in ROWS if row != "everything")[:3]
        missed = [f"{row} ({percent[row]:.1f} %, {bar})" for row, bar in TARGETS.items() if percent[row] < bar]
        square, other = square_and_other(exam["more_by_size"])
        first_square, first_other = square_and_other(exam["by_size"])
        sentences = [
            f"{name}: weakest in {', '.join(f'{row} ({p:.1f} %)' for p, row in weakest)}.",
            f"Below its target: {', '.join(missed)}." if missed else "No target missed.",
            f"{square:.1f} % of square images and {other:.1f} % of others are right (target: at most {MAX_GAP} points",
            f"apart; of the first {exam['prompts']} prompts, {first_square:.0f} and {first_other:.0f} %).",
        ]
        lines.append(" ".join(sentences))
    return "\n".join([*lines, "Words outside the vocabulary of the captions have no meaning to either."])


def write_card(
    weights: Path, figures: dict[str, dict], runs: str, scenes: int, retrieval: float, history: str = ONE_RUN
) -> None:
    """Write ``judge.json`` and ``README.md`` beside the weights.

    ``figures`` from :func:`evaluate_all`, ``runs`` from :func:`runs_table`; ``scenes``: how many the flow was trained
    on; ``retrieval``: CLIP's accuracy, a share; ``history``: anything else about how these weights were made.
    """
    first = next(iter(figures.values()))
    text = TEXT.format(
        shapes=", ".join(SHAPES), letters=", ".join(LETTERS), colors=len(COLORS), backgrounds=len(BACKGROUNDS),
        aspects=len(ASPECTS), runs=runs, scenes=scenes, history=history,
        dropout=100 * flow.CAPTION_DROPOUT, low=flow.GUIDANCE[0], high=flow.GUIDANCE[1], prompts=first["prompts"],
        steps=first["steps"], guidance=" and ".join(f"{exam['guidance']:g} ({name})" for name, exam in figures.items()),
        table=exam_table(figures), psnr=first["autoencoder_psnr"], retrieval=100 * retrieval,
        failures=failures(figures), by_size=sizes_table(figures), by_size_prompts=BY_SIZE_PROMPTS,
        sections=sections(weights), last=LAST_TITLE,
    )  # fmt: skip
    write_text(weights / "judge.json", json.dumps(figures, indent=2) + "\n")
    write_text(weights / "README.md", text)


# ---------------------------------------------------------------- sections with figures of their own


def add_entry(weights: Path, name: str, entry: dict, file: str = "family.json") -> None:
    """Add a model to ``file``, and to the model card if there is one."""
    weights, card = Path(weights), Path(weights) / "README.md"
    path = weights / file
    weights.mkdir(parents=True, exist_ok=True)
    with folder_lock(weights):  # two processes that train at the same time each add their entry
        entries = check_keys(str(path), read_json_file(path), error=CheckpointError) if path.exists() else {}
        write_text(path, json.dumps(dict(sorted({**entries, name: entry}.items())), indent=2) + "\n")
        if card.is_file():
            refresh(card)


def refresh(card: Path) -> None:
    """Write the card's sections on family, arena, baselines and FLUX.2 again, from the figures."""
    text = card.read_text()
    before = text
    for title in (FAMILY_TITLE, ARENA_TITLE, BASELINES_TITLE, FLUX2_TITLE, LAST_TITLE):
        before = before.split(title)[0]
    write_text(card, before + sections(card.parent) + text[text.index(LAST_TITLE) :])


def sections(weights: Path) -> str:
    """The sections on family, arena, baselines and FLUX.2; those without figures are left out."""
    text = ""
    for file, section in (
        ("family.json", family_section), ("arena.json", arena_section), ("baselines.json", baselines_section),
    ):  # fmt: skip
        if (path := Path(weights) / file).is_file():
            text += "\n".join([*section(read_json_file(path)), "", ""])
    runs = evidence.load("flux2")["runs"]
    if "flux2" in runs and (Path(weights) / SHIPPED_FLUX2["nano-flux2"].transformer).is_dir():
        text += "\n".join([*flux2_section(runs), "", ""])
    return text


def load_call(name: str) -> str:
    """How a model of the family is opened: by its own name, or as a style of the miniature."""
    return f'`load("nano", lora="{name}")`' if name in LORAS else f"`nano-{name}`"


def family_section(entries: dict[str, dict]) -> list[str]:
    """The models of the family: figures, targets, cost."""
    lines = [
        FAMILY_TITLE,
        "",
        "`fluxedu train --variant NAME` starts from the miniature; the exam is `training/family_exam.py`, on held-out "
        "scenes.",
        "",
        "| model | figures (target) | guidance | scenes judged | steps x batch | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in entries.items():
        figures = ", ".join(f"{row} {entry['figures'][row]:.1f} ({bar})" for row, bar in entry["bars"].items())
        cost = f"{entry['steps']} x {entry['batch']} | {entry['minutes']}"
        lines.append(f"| {load_call(name)} | {figures} | {entry['guidance']} | {entry['scenes']} | {cost} |")
    histories = [f"{load_call(name)}: {entry['history']}" for name, entry in entries.items() if "history" in entry]
    return [*lines, "", *histories]


def arena_section(axes: dict[str, dict]) -> list[str]:
    """Ratings as ``fluxedu arena table --out`` writes them."""
    first = next(iter(axes.values()))
    votes = sum(row["votes"] for ratings in axes.values() for row in ratings.values()) // 2
    lines = [
        ARENA_TITLE,
        "",
        f"Elo with its 95 % interval, from {votes} votes of the judge on pairs of images: `fluxedu arena run "
        f"{' '.join(sorted(first))} --count {votes}`. Where intervals overlap, the votes do not separate the models.",
        "",
        f"| | {' | '.join(axes)} |",
        "|---" * (1 + len(axes)) + "|",
    ]
    for name in first:
        rated = [ratings.get(name) for ratings in axes.values()]
        cells = [f"{r['elo']:.0f} ({r['low']:.0f} to {r['high']:.0f})" if r else "" for r in rated]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def baselines_section(entries: dict[str, dict]) -> list[str]:
    """Two models on one budget, as ``fluxedu train --variant sd`` and ``twin`` note them."""

    def row(label: str, cell) -> str:
        return f"| {label} | {' | '.join(str(cell(entry)) for entry in entries.values())} |"

    def percent(cell: dict) -> str:
        return f"{cell['percent']:.1f}" if cell["n"] else ""

    first = next(iter(entries.values()))
    lines = [
        BASELINES_TITLE,
        "",
        "Both were trained from scratch with the same scenes, encoders, autoencoder, optimiser and minutes; neither is "
        "the miniature, which was trained for far longer. `sd`: diffusers' U-Net, noise prediction, DDIM. `twin`: the "
        f"miniature's flow. Judged on {first['exam']['prompts']} held-out prompts in 20 steps with guidance "
        f"{first['guidance']:g}, two model evaluations per step; other numbers of steps on the first {first['few']}. "
        "`sd` ships (`fluxedu judge --model sd`), the twin does not: `fluxedu train --variant twin` makes it.",
        "",
        f"| | {' | '.join(entries)} |",
        "|---" * (1 + len(entries)) + "|",
        row("parameters", lambda entry: f"{entry['parameters']:,}"),
        row("minutes of one core", lambda entry: entry["minutes"]),
        row("steps x batch", lambda entry: f"{entry['steps']} x {entry['batch']}"),
    ]
    for name in ROWS:
        lines.append(row(name, lambda entry, name=name: percent(entry["exam"]["rows"][name])))
    lines += [
        row("squares, other sizes", lambda e: "{:.0f}, {:.0f}".format(*square_and_other(e["exam"]["by_size"]))),
        row("quality", lambda entry: f"{entry['exam']['quality']:.3f}"),
        row("diversity", lambda entry: f"{entry['exam']['diversity']:.3f}"),
    ]
    for steps in first["by_steps"]:
        lines.append(row(f"everything, {steps} steps", lambda entry, steps=steps: percent(entry["by_steps"][steps])))
    return lines


def flux2_section(runs: dict[str, dict]) -> list[str]:
    """The miniature FLUX.2, and FLUX.1 with one of its changes each: a row per model that is judged."""
    rows = [row for row in ROWS if row in runs["twin"]["right"]]
    compared = "prompt by prompt, a bootstrap" if runs["flux2"]["paired"] else "as two samples, Newcombe"
    lines = [
        FLUX2_TITLE,
        "",
        "`nano-flux2` has all changes of FLUX.2, the others one each. All were trained from scratch like the `twin` "
        "above, for the same computing time; the shipped one is `flux2`. Percent right on 500 held-out prompts in 20 "
        "steps with guidance 5; for everything with 95 % intervals, of the share (Wilson) and of the difference from "
        f"the twin ({compared}). Each model is one training run: the intervals include the choice of prompts, not what "
        "another seed would change.",
        "",
        f"| | parameters | steps x batch | {' | '.join(rows)} | everything minus twin |",
        "|---" * (4 + len(rows)) + "|",
    ]
    for name, run in runs.items():
        right = [f"{100 * run['right'][row]['value']:.1f}" for row in rows]
        right[rows.index("everything")] += " ({:.1f} to {:.1f})".format(*_ends(run["right"]["everything"]))
        minus = run.get("minus twin", {}).get("everything")
        gap = "" if minus is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(100 * minus["value"], *_ends(minus))
        cost = f"{run['parameters']:,} | {run['steps']} x {run['batch']}"
        lines.append(f"| `{name}` | {cost} | {' | '.join(right)} | {gap} |")
    return lines


def _ends(entry: dict) -> tuple[float, float]:
    """The interval of a stored result in percent."""
    return 100 * entry["low"], 100 * entry["high"]


if __name__ == "__main__":
    refresh(WEIGHTS / "README.md")
