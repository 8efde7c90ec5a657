"""The catalogue of sites: every value that can be recorded or changed, with its axes, its meaning and its source line.

A site's description is written once, as a comment on the line where the value passes::

    q = self.probe("q", q)  # [B, H, N, d] queries, before QKNorm

The catalogue reads those lines. A test walks through a real run and fails when a value passes without one.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from torch import nn

from fluxedu.errors import ConfigError, InstrumentError
from fluxedu.models.autoencoder import AutoEncoder, Flux2AutoEncoder
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.config import FLUX2_MODELS, FluxConfig
from fluxedu.models.flux import Flux
from fluxedu.models.flux2 import Flux2
from fluxedu.models.meta_init import meta_init
from fluxedu.models.modulation import SplitModulation
from fluxedu.models.t5 import T5Attention, T5Encoder
from fluxedu.probe import OTHER_NETWORKS, Probed, Sited, networks, site
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.velocity_field import VelocityField

#: globs of the sites of all networks
EVERYTHING = ("*", *(f"{network}*" for network in OTHER_NETWORKS))


def globs_of_everything(pipe: FluxPipeline) -> list[str]:
    """Those of ``EVERYTHING`` that match a site of the pipeline: FLUX.2 has no sites of CLIP and T5."""
    names = [site.name for site in sites(pipe)]
    return [glob for glob in EVERYTHING if any(fnmatch(name, glob) for name in names)]


#: what the letters of a shape stand for
LEGEND = {
    "B": "images; with classifier-free guidance the negative and the prompted pass",
    "L": "text tokens",
    "N": "image tokens, rows x columns of patches",
    "S": "tokens of the module's own stream: L or N",
    "T": "all tokens, text first: L + N",
    "H": "heads",
    "d": "channels per head",
    "D": "width of a token",
    "M": "width inside the MLP",
    "O": "channels per patch: 4 x the latent's",
    "C": "channels",
    "h": "rows of cells",
    "w": "columns of cells",
    "G": "cells, rows x columns of them",
}

_AXES = dict.fromkeys("dDMOC", "channel") | {"B": "batch", "L": "text", "N": "image", "T": "token", "H": "head"}
_AXES |= {"h": "row", "w": "column", "G": "cell", "d/2": "pair"}

#: a call that passes a value through a site, with its description: probe("name", ...)  # [shape] meaning
_LINE = re.compile(r'(?:probe\w*\(|self, )"(?P<name>[\w.]+)".*# \[(?P<shape>[^\]]+)\] (?P<meaning>.+)')
#: a call that passes the module on to a function, which has sites in its name: attend(q, k, v, ..., self)
_HELPER = re.compile(r"\b(\w+)\([^()]*\bself\)")


@dataclass(frozen=True)
class Site:
    """One site: ``name``, ``axes`` (names), ``shape`` (numbers, or letters of LEGEND), ``meaning``, ``source``."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int | str, ...]
    meaning: str
    source: str

    def __str__(self) -> str:
        return f"{self.name}  [{', '.join(map(str, self.shape))}]  {self.meaning}  ({self.source})"


@dataclass(frozen=True)
class Description:
    """What the comment beside a site says, and where it stands (``file:line``)."""

    shape: tuple[str, ...]
    meaning: str
    source: str


def sites(pipe=None) -> list[Site]:
    """Every site of a pipeline, of a network, or of a variant by name (``"dev"``); by default of the miniature.

    >>> import fluxedu as fe
    >>> print(next(s for s in fe.sites() if s.name == "double.1.attn.map"))
    double.1.attn.map  [B, 5, T, T]  attention map (lazy), one row per query  (models/attention.py:...)
    """
    chosen = _networks(pipe)
    found = []
    for network in chosen:
        sizes = _sizes(network)
        for module, name in _sites_of(network):
            described = _descriptions(type(module))[name]
            shape = _own_stream(described.shape, module)
            numbers = tuple(1 if letter == "1" else sizes.get(letter, letter) for letter in shape)
            found.append(Site(site(module, name), _axes(shape), numbers, described.meaning, described.source))
    if len(chosen) > 1:  # a whole pipeline, which has sites of its own
        for name, described in _pipeline_sites().items():
            if name == "pooled" and any(isinstance(network, Flux2) for network in chosen):
                continue
            full = f"{FluxPipeline.site_path}.{name}"
            found.append(Site(full, _axes(described.shape), described.shape, described.meaning, described.source))
    return found


def site_names(network: nn.Module | None) -> list[str]:
    """The names of a network's sites; the pipeline's own for None."""
    if network is None:
        return [f"{FluxPipeline.site_path}.{name}" for name in _pipeline_sites()]
    return [site(module, name) for module, name in _sites_of(network)]


def axes_of(owner: Sited, name: str) -> tuple[str, ...] | None:
    """The axes of the value that passes ``owner``'s site ``name``; None if it has no description."""
    described = _descriptions(type(owner)).get(name)
    return None if described is None else _axes(_own_stream(described.shape, owner))


def is_own(module: Probed) -> bool:
    """Whether the module's class is a user's, whose sites may have no description."""
    return not type(module).__module__.startswith("fluxedu.")


def _pipeline_sites() -> dict[str, Description]:
    return _descriptions(FluxPipeline) | _descriptions(VelocityField)


@cache
def _descriptions(kind: type) -> dict[str, Description]:
    """The described sites of a class, of its base classes, and of the functions that it passes itself to."""
    found: dict[str, Description] = {}
    for base in reversed(kind.__mro__):
        if not issubclass(base, Sited) or base in (Sited, Probed):
            continue
        try:
            lines, first = inspect.getsourcelines(base)
        except (OSError, TypeError):  # typed into an interpreter, say
            continue
        module = inspect.getmodule(base)
        for number, line in enumerate(lines):
            found |= _described(line, base, first + number)
            for name in _HELPER.findall(line):
                helper = getattr(module, name, None)
                if inspect.isfunction(helper) and "block" in inspect.signature(helper).parameters:
                    helper_lines, start = inspect.getsourcelines(helper)
                    for offset, helper_line in enumerate(helper_lines):
                        found |= _described(helper_line, helper, start + offset)
    return found


def _described(line: str, owner: object, number: int) -> dict[str, Description]:
    match = _LINE.search(line)
    if match is None:
        return {}
    file = Path(inspect.getsourcefile(owner))
    shape = tuple(letter.strip() for letter in match["shape"].split(","))
    return {match["name"]: Description(shape, match["meaning"].strip(), f"{file.parent.name}/{file.name}:{number}")}


def _sites_of(network: nn.Module) -> list[tuple[Probed, str]]:
    """(module, site name) for every site, in the order of the modules."""
    return [(m, name) for m in network.modules() if isinstance(m, Probed) for name in _names(m)]


def _names(module: Probed) -> list[str]:
    """The sites of a module: those of its class that its configuration has."""
    names = list(_descriptions(type(module)))
    if isinstance(module, SplitModulation):
        return [name for name in names if name[-1].isdigit() == module.is_double]
    if isinstance(module, Flux) and not module.config.guidance_embed:
        names.remove("vec.guidance")
    if isinstance(module, Flux2):
        names.remove("vec.text")
    if isinstance(module, T5Attention) and not hasattr(module, "relative_attention_bias"):
        names.remove("bias")
    return names


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
    if isinstance(pipe, str) and pipe in FLUX2_MODELS:
        with meta_init():
            return [Flux2(FLUX2_MODELS[pipe].flux), Flux2AutoEncoder()]
    try:
        config = FluxConfig.variant(pipe)
    except ConfigError as error:
        raise InstrumentError(f"{error} Or give a pipeline, or a network.") from None
    with meta_init():
        return [CLIPTextEncoder(), T5Encoder(), Flux(config), AutoEncoder()]


def _own_stream(shape: tuple[str, ...], owner: Sited) -> tuple[str, ...]:
    """``S`` is the length of the module's own stream: text or image."""
    return tuple(("L" if ".txt_" in owner.site_path else "N") if letter == "S" else letter for letter in shape)


def _axes(shape: tuple[str, ...]) -> tuple[str, ...]:
    if len(shape) == 4 and shape[-2] == shape[-1]:
        return ("batch", "head", "query", "key")
    return tuple(_AXES.get(letter, "one") for letter in shape)


def _sizes(network: nn.Module) -> dict[str, int]:
    """The letters of a shape whose values the network's config determines."""
    c = getattr(network, "config", None)
    if isinstance(network, Flux):
        sizes = {"H": c.num_heads, "D": c.hidden_size, "M": c.mlp_hidden, "O": c.out_channels}
        return sizes | {"d": c.head_dim, "d/2": c.head_dim // 2}
    if isinstance(network, T5Encoder):
        return {"H": c.num_heads, "D": c.d_model, "d": c.d_kv, "M": c.d_ff}
    if isinstance(network, CLIPTextEncoder):
        head_dim = c.hidden_size // c.num_attention_heads
        return {"H": c.num_attention_heads, "D": c.hidden_size, "d": head_dim, "M": c.intermediate_size}
    return {}
