"""Pages generated from the code: the map and the sites, the official code beside ours, explorers, course."""

import inspect
import shutil
from importlib import import_module
from pathlib import Path

import nbformat

import fluxedu as fe
from fluxedu import trace
from fluxedu.course.build import WIDGET, needs_solution
from fluxedu.instruments.parts import Part, parts

#: lines of black-forest-labs/flux at commit 802fb47 (July 2025) under src/flux/, the same part of fluxedu, differences
OFFICIAL = [
    (
        "modules/layers.py 11-25",
        "fluxedu.models.attention:rope_table",
        "position ids to rotations; ours are complex numbers",
    ),
    ("modules/layers.py 28-49", "fluxedu.models.modulation:timestep_embedding", "cosines first, times 1000"),
    ("modules/layers.py 52-60", "fluxedu.models.modulation:MLPEmbedder", ""),
    ("modules/layers.py 63-72", "fluxedu.models.attention:RMSNorm", "eps 1e-6, float32"),
    ("modules/layers.py 75-84", "fluxedu.models.attention:QKNorm", ""),
    (
        "modules/layers.py 87-103",
        "fluxedu.models.attention:SelfAttention",
        "q, k, v and the output projection of a stream",
    ),
    (
        "modules/layers.py 106-126",
        "fluxedu.models.modulation:Modulation",
        "in two steps, so that it can be computed ahead",
    ),
    ("modules/layers.py 129-191", "fluxedu.models.blocks:DoubleStreamBlock", ""),
    ("modules/layers.py 194-239", "fluxedu.models.blocks:SingleStreamBlock", ""),
    ("modules/layers.py 242-253", "fluxedu.models.flux:LastLayer", "shift before scale"),
    ("math.py 6-12", "fluxedu.models.attention:attend", "with its sites"),
    ("math.py 15-22", "fluxedu.models.attention:rope_table", "angles in float64"),
    ("math.py 25-30", "fluxedu.models.attention:rotate", "pairs of neighbouring channels, not halves"),
    ("model.py 17-31", "fluxedu.models.config:FluxConfig", "every variant as data"),
    ("model.py 34-119", "fluxedu.models.flux:Flux", "plan (modulation), then velocity"),
    ("sampling.py 17-33", "fluxedu.sampling.latents:draw_noise", "drawn on the CPU"),
    ("sampling.py 36-67", "fluxedu.sampling.latents:image_ids", "also text_ids and pack"),
    ("sampling.py 277-305", "fluxedu.sampling.solvers:schedule", "mu is not clamped"),
    ("sampling.py 308-353", "fluxedu.sampling.pipeline:FluxPipeline.denoise", "with any solver"),
    ("sampling.py 356-364", "fluxedu.sampling.latents:unpack", ""),
    ("modules/conditioner.py 5-37", "fluxedu.sampling.prompts:PromptEncoder", "with our own CLIP and T5"),
    ("modules/autoencoder.py 25-52", "fluxedu.models.autoencoder:AttnBlock", ""),
    ("modules/autoencoder.py 55-82", "fluxedu.models.autoencoder:ResnetBlock", ""),
    ("modules/autoencoder.py 109-180", "fluxedu.models.autoencoder:Encoder", ""),
    ("modules/autoencoder.py 183-264", "fluxedu.models.autoencoder:Decoder", ""),
    ("modules/autoencoder.py 282-318", "fluxedu.models.autoencoder:AutoEncoder", "encodes to the mean"),
    ("modules/image_embedders.py 64-99", "fluxedu.models.redux:ReduxHead", "the head, without SigLIP"),
    ("modules/lora.py 34-94", "fluxedu.checkpoints.lora", "merged into the weights; a merge can be undone"),
    (
        "modules/lora.py 5-31, model.py 122-143",
        "fluxedu.checkpoints.lora:merge",
        "no wrapper module: the result is one matrix",
    ),
    (
        "sampling.py 70-104",
        "fluxedu.sampling.conditions:encode_conditions",
        "control: a second latent, as more channels",
    ),
    ("sampling.py 107-157", "fluxedu.sampling.conditions:fill_channels", "fill: the mask, its pixels as channels"),
    ("sampling.py 160-207", "fluxedu.sampling.pipeline:FluxPipeline.encode", "redux: image tokens after the text"),
    ("sampling.py 210-274", "fluxedu.sampling.conditions:reference_ids", "kontext: the reference has frame id 1"),
    ("modules/autoencoder.py 8-22", "fluxedu.models.config:AutoEncoderConfig", ""),
    ("modules/autoencoder.py 85-106", "fluxedu.models.autoencoder:Downsample", "and Upsample"),
    ("modules/autoencoder.py 267-279", "fluxedu.models.autoencoder:AutoEncoder.moments", "the mean, no sample"),
    (
        "modules/image_embedders.py 13-61",
        "fluxedu.sampling.images:edges",
        "edges with OpenCV, as there; no depth estimator",
    ),
    ("util.py 287-730", "fluxedu.checkpoints.official:find", "finding and opening files"),
]

#: the same for lines of black-forest-labs/flux2 at commit ab7cca6 (December 2025) under src/flux2/
OFFICIAL_FLUX2 = [
    ("model.py 9-19", "fluxedu.models.config:Flux2Config", "every variant as data, klein too"),
    ("model.py 22-131", "fluxedu.models.flux2:Flux2", "its velocity is FLUX.1's; klein has no guidance input"),
    ("model.py 149-156", "fluxedu.models.flux2:SwiGLU", ""),
    ("model.py 159-171", "fluxedu.models.flux2:SharedModulation", "three for all blocks"),
    ("model.py 196-249", "fluxedu.models.flux2:Flux2SingleStreamBlock", "`forward` is FLUX.1's"),
    ("model.py 252-349", "fluxedu.models.flux2:Flux2DoubleStreamBlock", "`forward` is FLUX.1's"),
    ("model.py 363-376", "fluxedu.models.attention:rope_table", "with four axes"),
    ("sampling.py 52-90", "fluxedu.sampling.conditions:encode_conditions", "reference pictures"),
    ("sampling.py 93-103", "fluxedu.sampling.latents:text_ids", "(0, 0, 0, index)"),
    ("sampling.py 141-151", "fluxedu.sampling.latents:image_ids", "(0, row, column, 0)"),
    ("sampling.py 240-248", "fluxedu.sampling.flux2:Flux2Pipeline.times", ""),
    ("sampling.py 251-266", "fluxedu.sampling.flux2:empirical_mu", ""),
    ("sampling.py 269-307", "fluxedu.sampling.pipeline:FluxPipeline.denoise", "the same as for FLUX.1"),
    ("text_encoder.py 26-241", "fluxedu.sampling.flux2:Flux2PromptEncoder", "Mistral and Qwen3, from transformers"),
    ("autoencoder.py 271-336", "fluxedu.models.autoencoder:Flux2AutoEncoder", "latents keep their rows and columns"),
]


def source_lines(name: str) -> str:
    """The file and the lines of ``module:Class.method``."""
    module, _, inside = name.partition(":")
    target = import_module(module)
    for part in filter(None, inside.split(".")):
        target = getattr(target, part)
    target = inspect.unwrap(target) if callable(target) else target  # without torch.no_grad()
    lines, first = inspect.getsourcelines(target)
    file = Path(inspect.getsourcefile(target)).relative_to(Path(fe.__file__).parent)
    return f"`fluxedu/{file}` {max(first, 1)}-{max(first, 1) + len(lines) - 1}"


def table(*rows: tuple[str, ...]) -> str:
    """A Markdown table; the first row is its head."""
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rest]) + "\n"


def source_link(line: str) -> str:
    """``models/attention.py:103`` as a link to that file on this site."""
    page = line.partition(":")[0].removesuffix(".py")
    return f'<a href="_modules/fluxedu/{page}.html"><code>{line}</code></a>'


def section_of(part: Part) -> str:
    """The part whose section describes ``part``: blocks are alike, so only the first of each kind has a section."""
    kind = part.name.partition(".")[0]
    return f"{kind}.0" if kind in ("double", "single") else part.name


def anchor(name: str) -> str:
    return f"part-{name.replace('.', '-')}"


def living_map() -> str:
    """The map of the model as HTML: its boxes open, and show the values of one recorded run."""
    prompt = "a red circle left of a blue square"
    _, stages = trace.stages(fe.load(), prompt, seed=0, steps=10, progress=False)
    package = Path(fe.__file__).parent
    script, style = ((package / name).read_text(encoding="utf-8") for name in ("map.js", "map.css"))
    return (
        f'<div id="fluxedu-map" class="wide-map"></div>\n<style>{style}</style>\n'
        f'<script type="application/json" id="fluxedu-map-data">{trace.map_data(stages)}</script>\n'
        f'<script type="module">{script}\n{MAP_SCRIPT}</script>'
    )


#: shows the map; a line of code becomes a link to its file on this site, at that line where the browser can find it
MAP_SCRIPT = """
const data = JSON.parse(document.getElementById("fluxedu-map-data").textContent);
const link = (source, code) => {
  const page = source.split(":")[0].replace(/\\.py$/, "");
  return `_modules/fluxedu/${page}.html#:~:text=${encodeURIComponent(code).replaceAll("-", "%2D")}`;
};
fluxeduMap.show(document.getElementById("fluxedu-map"), data, { link, step: 5 });
"""


def course(notebooks: Path, folder: Path) -> None:
    """Write the students' edition of every notebook, with the outputs that need a solution folded in from the other.

    Widgets are left out, since there is no kernel: an explorer shows its static figure, which the page makes live.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted(notebooks.glob("[0-9][0-9]*-*.ipynb")):
        student, solved = (nbformat.read(p, 4) for p in (path, notebooks / "solved" / path.name))
        outputs = {cell.source: cell.outputs for cell in solved.cells if needs_solution(cell)}
        for cell in filter(needs_solution, student.cells):
            cell.outputs = outputs[cell.source]
            cell.metadata |= {"tags": ["hide-output"], "mystnb": {"code_prompt_show": "What it shows once solved"}}
        for cell in filter(lambda cell: cell.cell_type == "code", student.cells):
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        nbformat.write(student, folder / path.name)


def pages(folder: Path) -> None:
    """Write the tables of the official code and of the sites, the map, and the list of explorers."""
    folder.mkdir(exist_ok=True)
    for file, official_code in (("official.md", OFFICIAL), ("official_flux2.md", OFFICIAL_FLUX2)):
        rows = []
        for official, name, difference in official_code:
            ours = name.partition(":")[2] or name
            rows.append((f"`{official}`", f"`{ours}`", source_lines(name), difference))
        (folder / file).write_text(table(("official lines", "in fluxedu", "lines", "differences"), *rows))

    pipe = fe.load()
    model_parts, every = parts(pipe), fe.sites(pipe)
    sections = []
    for part in model_parts:
        if section_of(part) != part.name:
            continue
        rows = [
            (f"`{site.name}`", ", ".join(map(str, site.shape)), site.meaning, source_link(site.source))
            for site in every
            if part.has(site.name)
        ]
        head = f"({anchor(part.name)})=\n## {part.title}\n\n{part.text}\n\n"
        sections.append(head + table(("site", "shape", "meaning", "source"), *rows))
    (folder / "sites.md").write_text("\n".join(sections))
    (folder / "map.md").write_text(f"```{{raw}} html\n{living_map()}\n```\n", encoding="utf-8")
    explorers = [f".. autofunction:: fluxedu.widgets.{name}.{name}" for name in fe.widgets.explorers()]
    (folder / "explorers.md").write_text("```{eval-rst}\n" + "\n".join(explorers) + "\n```\n")
