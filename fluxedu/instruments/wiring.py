"""What a model computes, as nested boxes in the order of computation: the data behind the map of the model.

A box has an id, a title, a formula, an explanation, a shape, and, if a value can be recorded there, the name of its
site. Boxes that open have ``inside``: a group, or the name of a template, since all blocks of a kind are alike.
Titles, formulas (as LaTeX) and explanations are written in ``boxes.json``; ``node web/build.mjs formulas`` turns the
formulas into MathML.

    python -m fluxedu.instruments.wiring > web/src/wiring.json      # the miniature's, for pages without Python
"""

from __future__ import annotations

import json
import linecache
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fluxedu.instruments.catalogue import Site, sites

HERE = Path(__file__).parent
Box = dict[str, Any]
Group = dict[str, Any]


@cache
def _written() -> dict[str, dict[str, str]]:
    """``boxes.json``: key -> title, formula (LaTeX), the meaning of its letters (``where``) and text.

    A box that is not a site has ``code`` too, the name of the code behind it: ``models.flux:Flux.plan``.
    """
    return json.loads((HERE / "boxes.json").read_text(encoding="utf-8"))


@cache
def _formulas() -> dict[str, str]:
    """Key in ``boxes.json`` -> its formula as MathML."""
    return json.loads((HERE / "formulas.json").read_text(encoding="utf-8"))


def _line(source: str) -> str:
    """The line of code at ``models/blocks.py:78``."""
    file, _, number = source.rpartition(":")
    return linecache.getline(str(HERE.parent / file), int(number)).partition("  # ")[0].strip()


@cache
def _place(name: str) -> str:
    """``models.flux:Flux.plan`` as ``models/flux.py:127``, where it is defined."""
    module, _, inside = name.partition(":")
    file = f"{module.replace('.', '/')}.py"
    lines, at = linecache.getlines(str(HERE.parent / file)), 0
    for part in inside.split("."):
        at = next(i for i in range(at, len(lines)) if re.match(rf"\s*(class|def) {part}\b", lines[i]))
    return f"{file}:{at + 1}"


class _Maker:
    """Makes boxes for the sites of one model."""

    def __init__(self, every: Mapping[str, Site]):
        self.every = every
        self.templates: dict[str, Group] = {}

    def box(self, key: str, kind: str, name: str, *, block: str = "", **more) -> Box:
        """The box of the site ``name``, or one without a site, with the texts of ``key``.

        block: a block whose sites stand for those of all blocks of its kind: in the box, it is called ``{b}``.
        """
        written = _written()[key]
        words = {"{stream}": more.pop("stream", ""), "{n}": str(more.pop("n", ""))}
        words["{Stream}"] = words["{stream}"].capitalize()
        title, text = written["title"], written["text"]
        for word, value in words.items():
            title, text = title.replace(word, value), text.replace(word, value)
        site = self.every.get(name.replace("{b}", block))
        if site is None and "code" not in written:
            return {"id": name, "is_missing": True}  # not in this model; left out of the result
        place = site.source if site is not None else _place(written["code"])
        box = {"id": name, "title": title, "kind": kind, "formula": key, "text": text}
        box |= {"shape": None if site is None else list(site.shape), "site": None if site is None else name}
        box |= {"source": place, "code": _line(place)} | more
        return box | {name: written[name] for name in ("short", "where") if name in written}

    def has(self, name: str) -> bool:
        return name in self.every

    # ------------------------------------------------------------ blocks of the transformer

    def double(self, block: str) -> Group:
        """The wiring of a double-stream block: both streams side by side, one attention between their halves."""

        def make(key: str, kind: str, name: str, **more) -> Box:
            return self.box(key, kind, f"{{b}}.{name}", block=block, **more)

        def before(s: str, kind: str) -> list[list[Box]]:
            """A stream's rows up to the joint attention; the values pass it on the outside."""
            q, k, v = (make(letter, kind, f"{s}_attn.{letter}") for letter in "qkv")
            norms = [make(f"{letter}_norm", kind, f"{s}_attn.{letter}_norm") for letter in "qk"]
            return [
                [make("double.mod", "time", f"{s}_mod", stream=kind)],
                [make("norm", kind, f"{s}_norm1")],
                [make("shift", "time", f"{s}_mod.shift1"), make("scale", "time", f"{s}_mod.scale1")],
                [make("modulated", kind, f"{s}_modulated1")],
                [v, q, k] if s == "txt" else [q, k, v],
                [_space(1), *norms] if s == "txt" else [*norms, _space(1)],
            ]

        def after(s: str, kind: str) -> list[list[Box]]:
            """A stream's rows after the joint attention; what is added to the stream is next to its rail."""
            attn = [make("attn_contribution", kind, f"{s}_attn_contribution"), make("gate", "time", f"{s}_mod.gate1")]
            mlp = [make("mlp_contribution", kind, f"{s}_mlp_contribution"), make("gate", "time", f"{s}_mod.gate2")]
            return [
                [make("head_contribution", kind, f"{s}_head_contribution"), make("attn_out", kind, f"{s}_attn_out")],
                attn if s == "txt" else attn[::-1],
                [make("norm", kind, f"{s}_norm2")],
                [make("shift", "time", f"{s}_mod.shift2"), make("scale", "time", f"{s}_mod.scale2")],
                [make("modulated", kind, f"{s}_modulated2")],
                [make("mlp.hidden", kind, f"{s}_mlp.hidden")],
                [make("mlp_out", kind, f"{s}_mlp_out")],
                mlp if s == "txt" else mlp[::-1],
            ]

        streams = "S_norm1>S_modulated1 S_modulated1>S_attn.q S_modulated1>S_attn.k S_modulated1>S_attn.v "
        streams += "S_attn.q>S_attn.q_norm S_attn.k>S_attn.k_norm S_attn.q_norm>attn.q S_attn.k_norm>attn.k "
        streams += "S_attn.v>heads heads>S_attn_out heads>S_head_contribution S_attn_out>S_attn_contribution "
        streams += "S_norm2>S_modulated2 S_modulated2>S_mlp.hidden S_mlp.hidden>S_mlp_out S_mlp_out>S_mlp_contribution "
        streams += "S>x S_out>out "
        joint = "attn.rope>attn.q attn.rope>attn.k attn.q>attn.scores attn.k>attn.scores attn.scores>attn.map "
        joint += "attn.map>heads"
        rails, pluses = [], []
        for s, kind, side in (("txt", "text", "left"), ("img", "image", "right")):
            b = f"{{b}}.{s}"
            names = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")
            rail = {"side": side, "kinds": [kind], "from": b, "to": f"{b}_out", "taps": [f"{b}_norm1", f"{b}_norm2"]}
            rails.append(rail | {"modulation": f"{b}_mod", "modulates": [f"{b}_mod.{name}" for name in names]})
            for layer in ("attn", "mlp"):
                pluses.append(make(f"plus.{layer}", kind, f"{s}.plus.{layer}", at=f"{b}_{layer}_contribution"))
        beside = lambda *row: [_space(0.7), *row, _space(0.7)]  # noqa: E731 - room for the arrows of the values
        rope = [make(key, "flow", f"attn.{name}") for key, name in (("rope_q", "q"), ("rope", "rope"), ("rope_k", "k"))]
        rows = [
            [
                make("double.in", "text", "txt", stream="text", edge="left"),
                make("double.x", "flow", "x"),
                make("double.in", "image", "img", stream="image", edge="right"),
            ],
            [
                {"rows": before("txt", "text"), "title": "Text stream"},
                {"rows": before("img", "image"), "title": "Image stream"},
            ],
            beside(*rope),
            beside(make("scores", "flow", "attn.scores", weight=3)),
            beside(make("map", "flow", "attn.map", weight=3)),
            beside(make("heads", "flow", "heads", weight=3)),
            [{"rows": after("txt", "text")}, {"rows": after("img", "image")}],
            [
                make("double.out", "text", "txt_out", stream="text", edge="left"),
                make("double.x_out", "flow", "out"),
                make("double.out", "image", "img_out", stream="image", edge="right"),
            ],
        ]
        arrows = streams.replace("S", "txt") + streams.replace("S", "img") + joint
        return {"rows": rows, "flow": _arrows(arrows, "{b}."), "rails": rails, "pluses": pluses}

    def single(self, block: str) -> Group:
        """The wiring of a single-stream block: attention and MLP side by side."""

        def make(key: str, name: str, kind: str = "flow", **more) -> Box:
            return self.box(key, kind, f"{{b}}.{name}", block=block, **more)

        attention = [
            [make("v", "v"), make("q", "q"), make("k", "k")],
            [_space(1), make("q_norm", "q_norm"), make("k_norm", "k_norm")],
            [_space(0.9), make("rope_q", "attn.q"), make("rope", "attn.rope"), make("rope_k", "attn.k")],
            [_space(0.9), make("scores", "attn.scores", weight=3)],
            [_space(0.9), make("map", "attn.map", weight=3)],
            [_space(0.9), make("heads", "heads", weight=3)],
            [make("head_contribution", "head_contribution"), make("single.attn_out", "attn_out")],
        ]
        mlp = [[make("mlp.hidden", "mlp_hidden")], [make("single.mlp_out", "mlp_out")]]
        rows = [
            [make("single.in", "x", edge="both")],
            [make("single.mod", "mod", "time")],
            [make("norm", "norm")],
            [make("shift", "shift", "time"), make("scale", "scale", "time")],
            [make("modulated", "modulated")],
            [{"rows": attention, "title": "Attention", "weight": 3}, {"rows": mlp, "title": "MLP", "weight": 2}],
            [make("single.added", "added")],
            [make("single.contribution", "contribution"), make("gate", "gate", "time")],
            [
                make("single.attn_contribution", "attn_contribution"),
                make("single.mlp_contribution", "mlp_contribution"),
            ],
            [make("single.out", "out", edge="both")],
        ]
        pairs = "norm>modulated modulated>q modulated>k modulated>v q>q_norm k>k_norm q_norm>attn.q k_norm>attn.k "
        pairs += "attn.rope>attn.q attn.rope>attn.k attn.q>attn.scores attn.k>attn.scores attn.scores>attn.map "
        pairs += "attn.map>heads v>heads heads>attn_out heads>head_contribution modulated>mlp_hidden "
        pairs += "mlp_hidden>mlp_out attn_out>added mlp_out>added added>contribution "
        pairs += "contribution>attn_contribution contribution>mlp_contribution"
        rail = {
            "side": "left",
            "kinds": ["text", "image"],
            "from": "{b}.x",
            "to": "{b}.out",
            "taps": ["{b}.norm"],
            "modulation": "{b}.mod",
            "modulates": ["{b}.shift", "{b}.scale", "{b}.gate"],
        }
        plus = make("plus.single", "plus", at="{b}.contribution")
        return {"rows": rows, "flow": _arrows(pairs, "{b}."), "rails": [rail], "pluses": [plus]}

    # ------------------------------------------------------------ the text encoders

    def encoder_layer(self, encoder: str, block: str, bias: bool) -> Group:
        """A layer of T5 or CLIP."""
        is_t5 = encoder == "t5"
        attn = "layer.0.SelfAttention" if is_t5 else "self_attn"
        hidden = "layer.1.DenseReluDense.hidden" if is_t5 else "mlp.hidden"

        def make(key: str, name: str, **more) -> Box:
            return self.box(key, "text", f"{{b}}.{name}", block=block, **more)

        rows = [
            [make(f"{encoder}.norm", "norm1")],
            [make(letter, f"{attn}.{letter}") for letter in "qkv"],
            [*([make("t5.bias", f"{attn}.bias")] if bias else []), make(f"{encoder}.map", f"{attn}.map")],
            [make("heads", f"{attn}.heads")],
            [make("enc.attn_out", "attn_out")],
            [make(f"{encoder}.norm", "norm2")],
            [make(f"{encoder}.hidden", hidden)],
            [make("enc.mlp_out", "mlp_out")],
            [make("enc.out", "out", edge="both")],
        ]
        pairs = f"norm1>{attn}.q norm1>{attn}.k norm1>{attn}.v {attn}.q>{attn}.map {attn}.k>{attn}.map "
        pairs += f"{attn}.map>{attn}.heads {attn}.v>{attn}.heads {attn}.heads>attn_out norm2>{hidden} {hidden}>mlp_out"
        pairs += f" {attn}.bias>{attn}.map" if bias else ""
        taps = ["{b}.norm1", "{b}.norm2"]
        rail = {"side": "left", "kinds": ["text"], "from": None, "to": "{b}.out", "taps": taps}
        pluses = [make("enc.plus", f"plus.{name}", at=f"{{b}}.{name}_out") for name in ("attn", "mlp")]
        return {"rows": rows, "flow": _arrows(pairs, "{b}."), "rails": [rail], "pluses": pluses}

    def encoder(self, name: str) -> Group:
        """T5 or CLIP: embeddings, layers, output."""
        layers = _numbered(self.every, "t5.encoder.block." if name == "t5" else "clip.text_model.encoder.layers.")
        embedded = "t5.embedded" if name == "t5" else "clip.text_model.embedded"
        rows = [[self.box(f"{name}.embedded", "text", embedded)]]
        for n, layer in enumerate(layers):
            bias = self.has(f"{layer}.layer.0.SelfAttention.bias")
            template = f"{name}_layer" + ("_bias" if bias else "")
            self.templates.setdefault(template, self.encoder_layer(name, layer, bias))
            inside = {"template": template, "b": layer}
            rows.append([self.box(f"{name}.layer", "text", layer, n=n, inside=inside, shows=f"{layer}.out")])
        rows.append([self.box(f"{name}.states", "text", f"{name}.states")])
        if name == "clip":
            rows.append([self.box("clip.pooled", "text", "clip.pooled")])
        return _chain(rows)

    # ------------------------------------------------------------ the autoencoder

    def residual_block(self, name: str, n: int) -> Box:
        if "res" not in self.templates:

            def make(key: str, suffix: str) -> Box:
                return self.box(key, "image", f"{{b}}.{suffix}", block=name)

            rows = [[make("ae.norm1", "norm1")], [make("ae.norm2", "norm2")]]
            rows += [[make("ae.residual", "residual")], [make("ae.res_out", "out")]]
            self.templates["res"] = _chain(rows)
        return self.box("ae.res", "image", name, n=n, inside={"template": "res", "b": name}, shows=f"{name}.out")

    def middle(self, name: str) -> Box:
        attn = f"{name}.attn_1"
        if "ae_attn" not in self.templates:

            def make(letter: str, key: str) -> Box:
                return self.box(key, "image", f"{{b}}.{letter}", block=attn)

            rows = [[make("norm", "ae.norm")], [make(letter, f"ae.{letter}") for letter in "qkv"]]
            rows += [[make("map", "ae.map")], [make("out", "ae.attn_out")]]
            pairs = "norm>q norm>k norm>v q>map k>map v>out map>out"
            self.templates["ae_attn"] = {"rows": rows, "flow": _arrows(pairs, "{b}.")}
        rows = [
            [self.residual_block(f"{name}.block_1", 1)],
            [self.box("ae.attn", "image", attn, inside={"template": "ae_attn", "b": attn}, shows=f"{attn}.out")],
            [self.residual_block(f"{name}.block_2", 2)],
            [self.box("ae.mid_out", "image", name)],
        ]
        return self.box("ae.mid", "image", f"{name}.all", inside=_chain(rows), shows=name)

    def level(self, name: str, key: str) -> Box:
        blocks = _numbered(self.every, f"{name}.block.")
        rows = [[self.residual_block(block, n)] for n, block in enumerate(blocks)]
        rows.append([self.box("ae.level_out", "image", f"{name}.out")])
        number = int(name.rpartition(".")[2])
        return self.box(key, "image", name, n=number, inside=_chain(rows), shows=f"{name}.out")

    def decoder(self) -> Group:
        rows = [[self.middle("ae.decoder.mid")]]
        levels = _numbered(self.every, "ae.decoder.up.")
        rows += [[self.level(name, "ae.up")] for name in reversed(levels)]  # up.0 has the highest resolution
        rows.append([self.box("ae.image", "image", "ae.decoder.image")])
        return _chain(rows)

    def image_encoder(self) -> Group:
        rows = [[self.level(name, "ae.down")] for name in _numbered(self.every, "ae.encoder.down.")]
        rows += [[self.middle("ae.encoder.mid")], [self.box("ae.moments", "image", "ae.encoder.moments")]]
        return _chain(rows)

    # ------------------------------------------------------------ the whole

    def overview(self) -> list[Box]:
        """The top level. ``place``: column, first lane (text, CLIP, time, image) and number of lanes."""
        column = self._column

        def make(key: str, kind: str, place: tuple[int, int, int], name: str = "", **more) -> Box:
            return self.box(key, kind, name or key, place=list(place), **more)

        has_guidance = self.has("vec.guidance")
        has_pooled = self.has("vec.text")
        terms = [*(["text"] if has_pooled else []), "time", *(["guidance"] if has_guidance else [])]
        sources = [self.box("sample.pooled", "text", "sample.pooled")] if has_pooled else []
        sources += [self.box("vec.t_embed", "time", "vec.t_embed")]
        sources += [self.box("vec.g_embed", "time", "vec.g_embed")] if has_guidance else []
        rows = [
            sources,
            [self.box(f"vec.{t}", "time", f"vec.{t}") for t in terms],
            [self.box("vec.sum", "time", "vec")],
        ]
        starts = [source["id"] for source in sources]
        flow = [[start, f"vec.{term}"] for start, term in zip(starts, terms, strict=False)]
        vec = {"rows": rows, "flow": flow + [[f"vec.{term}", "vec"] for term in terms]}
        text = column([("sample.txt", "text", "sample.txt"), ("txt_in.linear", "text", "txt_in")])
        encoder = self.box("noise.encoder", "image", "ae.encoder", inside=self.image_encoder(), shows="ae.latent")
        start = self.box("noise.start", "image", "sample.noise")
        noise = _chain([[encoder], [self.box("noise.latent", "image", "ae.latent")], [start]])
        final_rows = [
            [self.box("norm", "flow", "final_layer.norm")],
            [self.box("shift", "time", "final_layer.shift"), self.box("scale", "time", "final_layer.scale")],
            [self.box("modulated", "flow", "final_layer.modulated")],
            [self.box("final.velocity", "image", "velocity")],
        ]
        pairs = "final_layer.norm>final_layer.modulated final_layer.shift>final_layer.modulated "
        pairs += "final_layer.scale>final_layer.modulated final_layer.modulated>velocity"
        final = {"rows": final_rows, "flow": _arrows(pairs, "")}
        passes = [self.box(f"velocity.{name}", "image", f"sample.{name}") for name in ("negative", "prompted")]
        guided = {"rows": [passes, [self.box("velocity.guided", "image", "sample.velocity")]]}
        guided["flow"] = _arrows("negative>velocity prompted>velocity", "sample.")
        names = (("x0", "image", "sample.x0"), ("step", "time", "solver.step"), ("latent", "image", "sample.latent"))
        solver = column([(f"solver.{key}", kind, name) for key, kind, name in names])
        if self.has("t5.states"):
            encoders = [
                make("t5_tokenizer", "text", (1, 0, 1)),
                make("t5", "text", (2, 0, 1), inside=self.encoder("t5"), shows="t5.states"),
            ]
        else:  # FLUX.2
            encoders = [make("tokenizer", "text", (1, 0, 1)), make("language_model", "text", (2, 0, 1))]
        if self.has("clip.pooled"):
            clip = make("clip", "text", (2, 1, 1), inside=self.encoder("clip"), shows="clip.pooled")
            encoders = [encoders[0], make("clip_tokenizer", "text", (1, 1, 1)), encoders[1], clip]
        return [
            make("prompt", "text", (0, 0, 2)),
            *encoders,
            make("time", "time", (2, 2, 1)),
            make("vec", "time", (3, 1, 2), "vec.all", inside=vec, shows="vec"),
            make("noise", "image", (0, 3, 1), inside=noise, shows="sample.noise"),
            make("latent", "image", (2, 3, 1), "sample.x", picture=True),
            make("txt_in", "text", (3, 0, 1), "text", inside=text, shows="txt_in"),
            make("img_in", "image", (3, 3, 1), "img_in"),
            make("double", "flow", (4, 0, 4), inside=self.blocks("double")),
            make("single", "flow", (5, 0, 4), inside=self.blocks("single")),
            make("final", "flow", (6, 1, 2), inside=final, shows="velocity"),
            make("velocity", "image", (7, 1, 2), "velocity.all", inside=guided, shows="sample.velocity", picture=True),
            make("solver", "image", (8, 1, 2), inside=solver, shows="sample.x", picture="sample.next"),
            make("decoder", "image", (9, 1, 2), inside=self.decoder(), shows="ae.decoder.image"),
            make("image", "image", (10, 1, 2), "sample.image", picture=True),
        ]

    def blocks(self, kind: str) -> Group:
        """The blocks of a kind, one below the other."""
        names = _numbered(self.every, f"{kind}.")
        make: Callable[[str], Group] = getattr(self, kind)
        if names:
            self.templates[kind] = make(names[0])
        rows = []
        for n, name in enumerate(names):
            inside = {"template": kind, "b": name}
            rows.append([self.box(f"{kind}.block", "flow", f"{name}", n=n, inside=inside, shows=f"{name}.out")])
        return _chain(rows)

    def _column(self, boxes: list[tuple[str, str, str]]) -> Group:
        rows = [[self.box(*box)] for box in boxes]
        return _chain(rows)


def _numbered(every: Mapping[str, Site], prefix: str) -> list[str]:
    """``double.0``, ``double.1``, ... for the prefix ``double.``."""
    numbers = {int(name[len(prefix) :].partition(".")[0]) for name in every if name.startswith(prefix)}
    return [f"{prefix}{n}" for n in sorted(numbers)]


def _space(weight: float) -> Group:
    """An empty cell of a row."""
    return {"rows": [], "weight": weight}


def _arrows(pairs: str, prefix: str) -> list[list[str]]:
    """``"q>scores k>scores"`` as pairs of ids."""
    return [[prefix + end for end in pair.split(">")] for pair in pairs.split()]


def _chain(rows: list[list[Box]]) -> Group:
    """Rows with an arrow from each row's last box to the next row's."""
    ids = [row[-1]["id"] for row in rows]
    return {"rows": rows, "flow": [list(pair) for pair in zip(ids, ids[1:], strict=False)]}


#: arrows between the boxes of the top level
OVERVIEW = "prompt>t5_tokenizer prompt>clip_tokenizer t5_tokenizer>t5 clip_tokenizer>clip t5>text clip>vec.all "
OVERVIEW += "time>vec.all noise>sample.x sample.x>img_in final>velocity.all velocity.all>solver solver>decoder "
OVERVIEW += "decoder>sample.image prompt>tokenizer tokenizer>language_model language_model>text"


def wiring(pipe=None) -> dict[str, Any]:
    """The wiring of a pipeline, or of a variant by name (``"dev"``); by default of the miniature.

    Returns a dictionary that can be written as JSON:

    - ``boxes``: the boxes of the top level in the order of computation, with their ``place`` in the overview (column,
      first lane, number of lanes), and ``flow``: the arrows between them, as pairs of ids;
    - ``templates``: groups shared by all blocks of a kind, in whose ids and sites ``{b}`` stands for the block's name;
    - ``formulas``: the MathML of each formula, by the name that boxes have for it;
    - ``letters``: the numbers behind the letters of the shapes, where they are known.

    A group has ``rows`` of boxes and of groups, ``flow``, and for residual streams ``rails`` (down a side) and
    ``pluses`` (where contributions are added). A box without a site of its own may show the value of another
    (``shows``). ``where`` names the letters of its formula. ``picture``: whether the overview shows its value, or the
    name of another (``sample.next``: the state after the step). :func:`boxes` lists all boxes.
    """
    every = {site.name: site for site in sites(pipe)}
    maker = _Maker(every)
    top = [_without_missing_inside(box) for box in maker.overview()]
    names = {box["id"] for box in top}
    return {
        "boxes": top,
        "flow": [ends for ends in _arrows(OVERVIEW, "") if names.issuperset(ends)],
        "templates": {name: _without_missing(group) for name, group in maker.templates.items()},
        "formulas": _formulas(),
        "letters": _letters(pipe),
    }


def _without_missing(group: Group) -> Group:
    """The group without boxes that the model does not have, and without their arrows."""
    rows = []
    for row in group["rows"]:
        cells = [_without_missing(cell) if "rows" in cell else _without_missing_inside(cell) for cell in row]
        rows.append([cell for cell in cells if not cell.get("is_missing")])
    result = group | {"rows": [row for row in rows if row]}
    names = {box["id"] for box in boxes({"templates": {}}, result)}
    if "flow" in group:
        result["flow"] = [ends for ends in group["flow"] if names.issuperset(ends)]
    return result


def _without_missing_inside(box: Box) -> Box:
    inside = box.get("inside")
    return box if inside is None or "template" in inside else box | {"inside": _without_missing(inside)}


def _letters(pipe) -> dict[str, int]:
    """Numbers of tokens for one image of the usual size."""
    if pipe is None:
        from fluxedu.loading import load

        pipe = load()
    if not hasattr(pipe, "autoencoder"):
        return {"B": 1}
    config = pipe.autoencoder.config
    cells = pipe.size // config.downscale
    text, image = pipe.defaults.text_length, (cells // 2) ** 2
    channels = pipe.autoencoder.config.z_channels
    return {"B": 1, "C": channels, "h": cells, "w": cells, "L": text, "N": image, "T": text + image}


def boxes(wiring: Mapping[str, Any], group: Group | None = None) -> Iterator[Box]:
    """All boxes of a wiring in the order of computation, each before those inside it; templates are filled in."""
    if group is None:
        for box in wiring["boxes"]:
            yield from _with_inside(wiring, box)
        return
    for row in group["rows"]:
        for cell in row:
            yield from boxes(wiring, cell) if "rows" in cell else _with_inside(wiring, cell)
    yield from group.get("pluses", ())


def _with_inside(wiring: Mapping[str, Any], box: Box) -> Iterator[Box]:
    yield box
    inside = box.get("inside")
    if inside is None:
        return
    if "template" not in inside:
        yield from boxes(wiring, inside)
        return
    if inside["template"] not in wiring["templates"]:
        return
    for inner in boxes(wiring, wiring["templates"][inside["template"]]):
        filled = {name: inner[name] and inner[name].replace("{b}", inside["b"]) for name in ("id", "site")}
        yield inner | filled


def for_pages() -> str:
    """The miniature's wiring as JSON, with files but without line numbers, which change often."""
    text = json.dumps(wiring(), ensure_ascii=False, indent=0)
    return re.sub(r'("source": "[\w/]+\.py):\d+"', r'\1"', text) + "\n"


if __name__ == "__main__":
    print(for_pages(), end="")
