"""The catalogue of sites: every value that can be seen or changed, with its axes and its meaning.

What is written down here, once, is a line for each site of each kind of module; which modules there are is
read off the network itself. A test walks through a real run and fails when a site has no line here.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import nn

from fluxedu.errors import ConfigError, InstrumentError
from fluxedu.models import attention
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.config import FluxConfig
from fluxedu.models.flux import Flux
from fluxedu.models.meta_init import meta_init
from fluxedu.models.modulation import Modulation
from fluxedu.models.t5 import T5Attention, T5Encoder
from fluxedu.probe import Probed, Sited, networks, site
from fluxedu.sampling.pipeline import FluxPipeline

#: what the letters of a shape stand for
LEGEND = {
    "B": "pictures, or with classifier-free guidance the negative and the prompted pass",
    "L": "text tokens",
    "N": "image tokens, rows x columns of patches",
    "T": "all tokens, text first: L + N",
    "H": "heads",
    "d": "numbers a head",
    "D": "width of a token",
    "M": "width inside the MLP",
    "O": "numbers a patch: 4 x the latent's channels",
    "C": "channels",
    "h": "rows of cells",
    "w": "columns of cells",
    "G": "cells, rows x columns of them",
}

AXES = {
    "B": "batch", "L": "text", "N": "image", "T": "token", "H": "head", "d": "channel", "D": "channel",
    "M": "channel", "O": "channel", "C": "channel", "h": "row", "w": "column", "G": "cell",
}  # fmt: skip


def _rows(text: str) -> dict[str, tuple[str, str]]:
    """Lines ``name | shape | meaning``; names with a bar between them share a line."""
    table = {}
    for line in filter(None, text.splitlines()):
        names, shape, meaning = (part.strip() for part in line.split(" : "))
        table |= {name: (shape, meaning) for name in names.split()}
    return table


def _each(stream: str, tokens: str) -> str:
    """The sites of one stream of a double block: the same for both."""
    return f"""
{stream} : B {tokens} D : the {stream} tokens as they enter the block
{stream}_norm1 : B {tokens} D : layer-normalised, before the attention's shift and scale
{stream}_modulated1 : B {tokens} D : shifted and scaled: what the attention reads
{stream}_attn_out : B {tokens} D : what the attention says to this stream, before its gate
{stream}_attn_contribution : B {tokens} D : gate times that: what is added to the stream
{stream}_norm2 : B {tokens} D : layer-normalised, before the MLP's shift and scale
{stream}_modulated2 : B {tokens} D : shifted and scaled: what the MLP reads
{stream}_mlp_out : B {tokens} D : what the MLP makes of it, before its gate
{stream}_mlp_contribution : B {tokens} D : gate times that: what is added to the stream
{stream}_out : B {tokens} D : the {stream} tokens as they leave the block"""


_JOINT = """
attn.rope : 1 T d/2 : the turn of every pair of every token, complex, one number a pair
attn.q : B H T d : queries, turned by position
attn.k : B H T d : keys, turned by position
attn.map : B H T T : who looks at whom: a lazy AttentionMap, a row a query, rows sum to 1
heads : B H T d : each head's output, before the heads are merged; cut a head here"""

_TEXT = """
q k v : B H L d : queries, keys, values
map : B H L L : which word piece looks at which: a lazy AttentionMap, a row a query, rows sum to 1
heads : B H L d : each head's output"""

#: a line for each site of each class of module
TABLE: dict[str, dict[str, tuple[str, str]]] = {
    "Flux": _rows("""
vec.time : B D : the time's share of vec
vec.guidance : B D : the guidance strength's share of vec
vec.text : B D : the pooled CLIP text's share of vec
vec : B D : their sum, from which every shift, scale and gate is made
img_in : B N D : the noisy patches, brought to the transformer's width
txt_in : B L D : T5's tokens, brought to the transformer's width
velocity : B N O : the answer: noise minus picture, a patch a token"""),
    "DoubleStreamBlock": _rows(_each("txt", "L") + _each("img", "N") + _JOINT),
    "SelfAttention": _rows("""
q : B H S d : queries, before the QKNorm
k : B H S d : keys, before the QKNorm
v : B H S d : values, what a token says to those that look at it
q_norm : B H S d : queries, each of root mean square 1 times a learned scale
k_norm : B H S d : keys, each of root mean square 1 times a learned scale"""),
    "MLP": _rows("hidden : B S M : inside the MLP, after the GELU"),
    "Modulation": _rows("""
shift1 scale1 : B 1 D : added to, and (plus 1) multiplied with, the normalised tokens before the attention
gate1 : B 1 D : multiplied with what the attention adds
shift2 scale2 : B 1 D : the same before the MLP
gate2 : B 1 D : multiplied with what the MLP adds
shift scale : B 1 D : of a single block, before attention and MLP alike
gate : B 1 D : multiplied with what a single block adds"""),
    "SingleStreamBlock": _rows("""
x : B T D : text and image tokens as they enter the block
norm : B T D : layer-normalised, before shift and scale
modulated : B T D : shifted and scaled: what attention and MLP both read
mlp_hidden : B T M : inside the MLP half, after the GELU
q : B H T d : queries, before the QKNorm
k : B H T d : keys, before the QKNorm
v : B H T d : values, what a token says to those that look at it
q_norm : B H T d : queries, each of root mean square 1 times a learned scale
k_norm : B H T d : keys, each of root mean square 1 times a learned scale""" + _JOINT + """
added : B T D : what attention and MLP make together, before the gate
contribution : B T D : gate times that: what is added to the tokens
out : B T D : the tokens as they leave the block"""),
    "LastLayer": _rows("""
shift scale : B 1 D : of the last modulation, which has no gate
norm : B N D : image tokens, layer-normalised
modulated : B N D : shifted and scaled: the last thing before the velocity"""),
    "T5Encoder": _rows("""
embedded : B L D : a vector a word piece, without places
states : B L D : what the transformer reads of the prompt, a vector a word piece"""),
    "T5Block": _rows("""
norm1 norm2 : B L D : each of root mean square 1 times a learned scale: what attention, and MLP, read
attn_out : B L D : what the attention adds
mlp_out : B L D : what the gated MLP adds
out : B L D : the tokens as they leave the block"""),
    "T5Attention": _rows("""
bias : 1 H L L : added to the scores by distance, the same for every prompt; the first block's serves all
""" + _TEXT),
    "T5GatedMLP": _rows("hidden : B L M : inside the gated MLP, the one half times the GELU of the other"),
    "CLIPTextEncoder": _rows("""
states : B L D : a vector a word piece, normalised; each has read only what stands before it
pooled : B D : the one at the end of the text: all that modulation hears of the prompt"""),
    "CLIPTextTransformer": _rows("embedded : B L D : a vector a word piece plus a vector a place"),
    "CLIPLayer": _rows("""
norm1 norm2 : B L D : layer-normalised: what attention, and MLP, read
attn_out : B L D : what the attention adds
mlp_out : B L D : what the MLP adds
out : B L D : the tokens as they leave the layer"""),
    "CLIPAttention": _rows(_TEXT),
    "CLIPMLP": _rows("hidden : B L M : inside the MLP, after the quick GELU"),
    "AutoEncoder": _rows("latent : B C h w : the picture as the flow sees it, of variance about 1"),
    "Encoder": _rows("""
level.* : B C h w : after a level of the pyramid, the picture halved
mid : B C h w : at the bottom, every cell having looked at every other
moments : B C h w : mean and log-variance of the raw latent, stacked"""),
    "Decoder": _rows("""
mid : B C h w : at the bottom, every cell having looked at every other
level.* : B C h w : after a level of the pyramid, the picture doubled
image : B C h w : the picture, about -1 to 1, h and w being pixels"""),
    "ResnetBlock": _rows("""
norm1 norm2 : B C h w : group-normalised: what either convolution reads, through a SiLU
residual : B C h w : what the block adds
out : B C h w : what leaves it"""),
    "AttnBlock": _rows("""
norm : B C h w : group-normalised: what the attention reads
q k v : B 1 G C : queries, keys, values of the cells, row by row
map : B 1 G G : which cell looks at which: a lazy AttentionMap of one head
out : B C h w : the cells, having looked at each other"""),
}  # fmt: skip

SAMPLER = _rows("""
txt : B L D : the prompt's T5 tokens, once a picture: edit the words here
pooled : B D : the prompt's CLIP vector, once a picture: edit the summary here
noise : B C h w : where the run begins
x : B C h w : the state at the beginning of each step; change it and the path goes on from there
negative prompted : B N O : the two passes of classifier-free guidance, before they are mixed
velocity : B C h w : the velocity the solver is given, guided; once a question, twice a step for midpoint and heun
x0 : B C h w : the picture foreseen, x - t velocity; another one put here steers the run to it
latent : B C h w : where the run ends
image : B C h w : the picture, about -1 to 1, h and w being pixels""")


@dataclass(frozen=True)
class Site:
    """One site: ``name``, ``axes`` (names), ``shape`` (numbers, and letters of LEGEND), ``meaning``, ``source``."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int | str, ...]
    meaning: str
    source: str

    def __str__(self) -> str:
        return f"{self.name}  [{', '.join(map(str, self.shape))}]  {self.meaning}  ({self.source})"


def names_of(network: nn.Module | None) -> list[str]:
    """The names of a network's sites; the sampler's for None."""
    if network is None:
        return [f"{FluxPipeline.site_path}.{name}" for name in SAMPLER]
    return [site(m, name) for m, name in _sites_of(network)]


def sites(pipe=None) -> list[Site]:
    """Every site of a pipeline, a network, or a variant by name (``"dev"``); of the miniature if not said.

    >>> import fluxedu as fe
    >>> print(next(s for s in fe.sites() if s.name == "double.1.attn.map"))
    double.1.attn.map  [B, 5, T, T]  who looks at whom: a lazy AttentionMap, a row a query, rows sum to 1  (...)
    """
    those = _networks(pipe)
    found = [_described(module, name, network) for network in those for module, name in _sites_of(network)]
    if len(those) > 1:  # a whole pipeline
        found += [
            Site(f"sample.{name}", _axes(shape), tuple(shape.split()), meaning, _source(FluxPipeline, name))
            for name, (shape, meaning) in SAMPLER.items()
        ]
    return found


def _networks(pipe) -> list[nn.Module]:
    if isinstance(pipe, nn.Module) and pipe in networks:
        return [pipe]
    if isinstance(pipe, nn.Module):
        raise InstrumentError(f"sites are listed of a whole network, such as pipe.flux, not of {type(pipe).__name__}.")
    if hasattr(pipe, "networks"):
        return list(pipe.networks().values())
    if pipe is None or (isinstance(pipe, str) and pipe == "nano"):
        from fluxedu.loading import load

        return list(load().networks().values())
    try:
        config = FluxConfig.variant(pipe)
    except ConfigError as error:
        raise InstrumentError(f"{error} Or give a pipeline, or a network.") from None
    with meta_init():
        return [CLIPTextEncoder(), T5Encoder(), Flux(config), AutoEncoder()]


def _sites_of(network: nn.Module) -> list[tuple[Probed, str]]:
    """(module, site name) for every site, in the order of the modules."""
    return [(m, name) for m in network.modules() if isinstance(m, Probed) for name in _names(m)]


def _names(module: Probed) -> list[str]:
    names = list(_lines(module))
    if isinstance(module, Modulation):
        return [n for n in names if n[-1].isdigit() == (module.layers == 2)]
    if isinstance(module, Flux) and not module.config.guidance_embed:
        names.remove("vec.guidance")
    if isinstance(module, T5Attention) and not hasattr(module, "relative_attention_bias"):
        names.remove("bias")
    levels = len(getattr(module, "down", getattr(module, "up", ())))
    return [f"level.{i}" for i in range(levels) if "level.*" in names] + [n for n in names if n != "level.*"]


def is_own(module: Probed) -> bool:
    """Is this a learner's module, whose sites the table cannot know?"""
    return type(module).__name__ not in TABLE


def _kind(module: Probed) -> type | None:
    """The class of a module that the table knows; a learner's own, put in a block's place, may have none."""
    return next((k for k in type(module).__mro__ if k.__name__ in TABLE), None)


def _lines(module: Probed) -> dict[str, tuple[str, str]]:
    kind = _kind(module)
    return TABLE[kind.__name__] if kind else {}


def _described(module: Probed, name: str, network: nn.Module) -> Site:
    lines = _lines(module)
    shape, meaning = lines[name] if name in lines else lines["level.*"]
    shape = _of_stream(shape, module)
    sizes = _sizes(network)
    numbers = tuple(sizes.get(letter, letter) for letter in shape.split())
    return Site(site(module, name), _axes(shape), numbers, meaning, _source(_kind(module), name))


def _of_stream(shape: str, module: Probed) -> str:
    """S is the stream's own tokens: text or image."""
    return shape.replace("S", "L" if ".txt_" in module.site_path else "N")


def _axes(shape: str) -> tuple[str, ...]:
    letters = shape.split()
    if len(letters) == 4 and letters[-2] == letters[-1]:
        return ("batch", "head", "query", "key")
    if letters == ["1", "T", "d/2"]:
        return ("one", "token", "pair")
    return tuple(AXES.get(letter, "one") for letter in letters)


def axes_of(owner: Sited, name: str) -> tuple[str, ...] | None:
    """The axes of the value that passes ``owner``'s site; None if the table does not know it."""
    lines = SAMPLER if isinstance(owner, FluxPipeline) else _lines(owner)
    line = lines.get(name) or lines.get(re.sub(r"\d+$", "*", name))
    return _axes(_of_stream(line[0], owner)) if line else None


def _sizes(network: nn.Module) -> dict[str, int]:
    """The letters that a network's config settles."""
    c = getattr(network, "config", None)
    if isinstance(network, Flux):
        head, sizes = c.head_dim, {"H": c.num_heads, "D": c.hidden_size, "M": c.mlp_hidden, "O": c.out_channels}
        return sizes | {"1": 1, "d": head, "d/2": head // 2}
    if isinstance(network, T5Encoder):
        return {"H": c.num_heads, "D": c.d_model, "d": c.d_kv, "M": c.d_ff}
    if isinstance(network, CLIPTextEncoder):
        return {
            "H": c.num_attention_heads,
            "D": c.hidden_size,
            "d": c.hidden_size // c.num_attention_heads,
            "M": c.intermediate_size,
        }
    return {}


@cache
def _source(kind: type, name: str) -> str:
    """``file:line`` of the call of a site: where its name, or the constant end of it, stands as a string."""
    ends = [f'"{name}"', f'}}_{name.partition("_")[2]}"', f'"{name.partition(".")[0]}.{{']
    for places in ((kind, inspect.getmodule(kind)), (attention,)):
        others = []  # a name may stand elsewhere too; best is where it is said to a probe
        for place in places:
            lines, first = inspect.getsourcelines(place)
            for number, line in ((n, line) for end in ends for n, line in enumerate(lines) if end in line):
                at = f"{_short(place)}:{max(first, 1) + number}"
                if "probe(" in line or "seen(" in line:
                    return at
                others += [] if "def " in line else [at]
        if others:
            return others[0]
    return _short(kind)


def _short(place: object) -> str:
    file = Path(inspect.getsourcefile(place))
    return f"{file.parent.name}/{file.name}"
