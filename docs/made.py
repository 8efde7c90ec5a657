"""Pages that are written from the code, so that they cannot disagree with it: parts and sites, and the official code's
lines beside ours.
"""

import inspect
import shutil
from html import escape
from importlib import import_module
from pathlib import Path

import nbformat

import fluxedu as fe
from fluxedu.course.build import needs_solution
from fluxedu.instruments.parts import Part, parts
from fluxedu.widgets.architecture import diagram

#: lines of black-forest-labs/flux at commit 802fb47 (July 2025), under src/flux/ -> ours
OFFICIAL = [
    ("modules/layers.py 11-25", "fluxedu.models.attention:rope_table", "ids to turns; ours keeps them complex"),
    ("modules/layers.py 28-49", "fluxedu.models.modulation:timestep_embedding", "cosines first, times 1000"),
    ("modules/layers.py 52-60", "fluxedu.models.modulation:MLPEmbedder", ""),
    ("modules/layers.py 63-72", "fluxedu.models.attention:RMSNorm", "eps 1e-6, float32"),
    ("modules/layers.py 75-84", "fluxedu.models.attention:QKNorm", ""),
    ("modules/layers.py 87-103", "fluxedu.models.attention:SelfAttention", "a stream's q, k, v and its way out"),
    ("modules/layers.py 106-126", "fluxedu.models.modulation:Modulation", "in two steps, so that it can be planned"),
    ("modules/layers.py 129-191", "fluxedu.models.blocks:DoubleStreamBlock", "a stream is written once"),
    ("modules/layers.py 194-239", "fluxedu.models.blocks:SingleStreamBlock", ""),
    ("modules/layers.py 242-253", "fluxedu.models.flux:LastLayer", "shift before scale"),
    ("math.py 6-12", "fluxedu.models.attention:attend", "with the sites in it"),
    ("math.py 15-22", "fluxedu.models.attention:rope_table", "angles in float64"),
    ("math.py 25-30", "fluxedu.models.attention:rotate", "neighbours, not halves"),
    ("model.py 17-31", "fluxedu.models.config:FluxConfig", "every variant as data"),
    ("model.py 34-119", "fluxedu.models.flux:Flux", "plan, then velocity"),
    ("sampling.py 17-33", "fluxedu.sampling.latents:draw_noise", "on the CPU"),
    ("sampling.py 36-67", "fluxedu.sampling.latents:image_ids", "and text_ids, pack"),
    ("sampling.py 277-305", "fluxedu.sampling.solvers:schedule", "mu is not clamped"),
    ("sampling.py 308-353", "fluxedu.sampling.pipeline:FluxPipeline.integrate", "any solver"),
    ("sampling.py 356-364", "fluxedu.sampling.latents:unpack", ""),
    ("modules/conditioner.py 5-37", "fluxedu.sampling.prompts:PromptEncoder", "our own CLIP and T5"),
    ("modules/autoencoder.py 25-52", "fluxedu.models.autoencoder:AttnBlock", ""),
    ("modules/autoencoder.py 55-82", "fluxedu.models.autoencoder:ResnetBlock", ""),
    ("modules/autoencoder.py 109-180", "fluxedu.models.autoencoder:Encoder", ""),
    ("modules/autoencoder.py 183-264", "fluxedu.models.autoencoder:Decoder", ""),
    ("modules/autoencoder.py 282-318", "fluxedu.models.autoencoder:AutoEncoder", "encodes to the mean"),
    ("modules/image_embedders.py 64-99", "fluxedu.models.redux:ReduxHead", "the head, without SigLIP"),
    ("modules/lora.py 34-94", "fluxedu.checkpoints.lora", "merged into the weights, and out again"),
    ("modules/lora.py 5-31, model.py 122-143", "fluxedu.checkpoints.lora:merge", "no wrapper: one matrix again"),
    ("sampling.py 70-104", "fluxedu.sampling.conditions:read", "control: a second latent beside the first"),
    ("sampling.py 107-157", "fluxedu.sampling.conditions:fill_channels", "fill: the mask folded, pixel by pixel"),
    ("sampling.py 160-207", "fluxedu.sampling.pipeline:FluxPipeline.with_image_prompt", "redux"),
    ("sampling.py 210-274", "fluxedu.sampling.conditions:reference_ids", "kontext: frame 1"),
    ("modules/autoencoder.py 8-22", "fluxedu.models.config:AutoEncoderConfig", ""),
    ("modules/autoencoder.py 85-106", "fluxedu.models.autoencoder:Downsample", "and Upsample"),
    ("modules/autoencoder.py 267-279", "fluxedu.models.autoencoder:AutoEncoder.moments", "the mean, not a sample"),
    (
        "modules/image_embedders.py 13-61",
        "fluxedu.sampling.images:edges",
        "edges by the same OpenCV; depth: bring your own",
    ),
    ("util.py 287-730", "fluxedu.checkpoints.official:find", "finding and opening files"),
]


def place(name: str) -> str:
    """``file:first-last`` of a dotted name."""
    module, _, inside = name.partition(":")
    target = import_module(module)
    for part in filter(None, inside.split(".")):
        target = getattr(target, part)
    target = inspect.unwrap(target) if callable(target) else target  # from under torch.no_grad()
    lines, first = inspect.getsourcelines(target)
    file = Path(inspect.getsourcefile(target)).relative_to(Path(fe.__file__).parent)
    return f"`fluxedu/{file}` {max(first, 1)}-{max(first, 1) + len(lines) - 1}"


def table(*rows: tuple[str, ...]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ("---",) * len(head), *rest]) + "\n"


def source(at: str) -> str:
    """``models/attention.py:103`` as a link to that file on this site."""
    page = at.partition(":")[0].removesuffix(".py")
    return f'<a href="_modules/fluxedu/{page}.html"><code>{at}</code></a>'


def shown(those: list[Part]) -> dict[str, str]:
    """Part -> the part that its section is about: blocks are alike, so the first of each kind has the section."""
    first = {"double": "double.0", "single": "single.0"}
    return {part.name: first.get(part.name.partition(".")[0], part.name) for part in those}


def anchor(name: str) -> str:
    return f"part-{name.replace('.', '-')}"


def picture(those: list[Part]) -> str:
    """The diagram as SVG, every part a link to its section below."""
    boxes, ways, (width, height) = diagram(those)
    about = shown(those)
    lines = [f'<polyline points="{" ".join(f"{v:g}" for v in way)}" marker-end="url(#tip)"/>' for way in ways]
    links = []
    for part, (label, x, y, w, h, colour) in zip(those, boxes, strict=True):
        links.append(
            f'<a href="#{anchor(about[part.name])}"><title>{escape(part.text)}</title>'
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" fill="{colour}33" stroke="{colour}"/>'
            f'<text x="{x + w / 2:g}" y="{y + h / 2:g}">{escape(label)}</text></a>'
        )
    tip = '<marker id="tip" markerWidth="6" markerHeight="6" refX="6" refY="3" orient="auto"><path d="M0 0L6 3L0 6Z"/>'
    return (
        f'<svg class="fluxedu-map" viewBox="0 0 {width:g} {height:g}" role="group" aria-label="The parts of FLUX">'
        f"<defs>{tip}</marker></defs>{''.join(lines)}{''.join(links)}</svg>"
    )


def course(notebooks: Path, folder: Path) -> None:
    """The student's edition of every notebook; what shows only once an exercise is solved is folded, from the other."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted(notebooks.glob("[0-9][0-9]-*.ipynb")):
        mine, solved = (nbformat.read(p, 4) for p in (path, notebooks / "solved" / path.name))
        outputs = {cell.source: cell.outputs for cell in solved.cells if needs_solution(cell)}
        for cell in filter(needs_solution, mine.cells):
            cell.outputs = outputs[cell.source]
            cell.metadata |= {"tags": ["hide-output"], "mystnb": {"code_prompt_show": "What it shows once solved"}}
        nbformat.write(mine, folder / path.name)


def pages(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    ours = lambda name: f"`{name.partition(':')[2] or name}`"  # noqa: E731
    rows = [(f"`{theirs}`", ours(name), place(name), said) for theirs, name, said in OFFICIAL]
    (folder / "official.md").write_text(table(("official lines", "ours", "where", "what differs"), *rows))
    pipe = fe.load()
    every, those, out = fe.sites(pipe), parts(pipe), []
    about = shown(those)
    for part in those:
        if about[part.name] != part.name:
            continue
        lines = [
            (f"`{s.name}`", ", ".join(map(str, s.shape)), s.meaning, source(s.source))
            for s in every
            if part.has(s.name)
        ]
        head = f"({anchor(part.name)})=\n## {part.title}\n\n{part.text}\n\n"
        out.append(head + table(("site", "shape", "what it is", "source"), *lines))
    (folder / "sites.md").write_text("\n".join(out))
    (folder / "map.md").write_text(f"```{{raw}} html\n{picture(those)}\n```\n")
    explorers = [f".. autofunction:: fluxedu.widgets.{name}.{name}" for name in fe.widgets.explorers()]
    (folder / "explorers.md").write_text("```{eval-rst}\n" + "\n".join(explorers) + "\n```\n")
