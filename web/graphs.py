"""What the page computes, as torch modules to export: the miniature's own networks, watched through their sites.

An export keeps what the sites receive. So a graph has one input for every change that the page offers, and its outputs
are the values that :func:`fluxedu.record` would record: the page's experiments are those of ``fe.intervene`` and
``fe.ablate`` because both pass through the same lines of code.

    site value  x  ->  factor * x         for the sites of :func:`factor_sites`; 1 leaves them as they are
    scores      s  ->  s + key_bias       minus infinity hides a token from all others, in every block
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fluxedu.attention_map import AttentionMap
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.config import FluxConfig
from fluxedu.models.flux import Flux
from fluxedu.models.t5 import T5Encoder
from fluxedu.probe import Sited, site, watch

_DOUBLE_MODULATION = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")
_SINGLE_MODULATION = ("shift", "scale", "gate")


def factor_sites(config: FluxConfig) -> dict[str, int]:
    """The sites whose values the page can multiply -> the number of their factors: one, or one per head."""
    sites = {"vec.time": 1, "vec.guidance": 1, "vec.text": 1}
    for i in range(config.depth):
        for stream in ("img", "txt"):
            sites |= {f"double.{i}.{stream}_mod.{part}": 1 for part in _DOUBLE_MODULATION}
            sites |= {f"double.{i}.{stream}_{layer}_contribution": 1 for layer in ("attn", "mlp")}
        sites[f"double.{i}.heads"] = config.num_heads
    for i in range(config.depth_single_blocks):
        sites |= {f"single.{i}.{part}": 1 for part in _SINGLE_MODULATION}
        sites |= {f"single.{i}.mlp_hidden": 1, f"single.{i}.contribution": 1}
        sites[f"single.{i}.heads"] = config.num_heads
    return sites | {"final_layer.shift": 1, "final_layer.scale": 1}


class Watcher:
    """Changes and collects values while a graph is traced; ``found`` has the collected ones, in order."""

    def __init__(
        self,
        collects: Callable[[str], bool],
        factors: dict[str, Tensor] | None = None,
        key_bias: Tensor | None = None,
    ):
        self.collects, self.factors, self.key_bias = collects, factors or {}, key_bias
        self.found: dict[str, Tensor] = {}

    def wants(self, owner: Sited, name: str) -> bool:
        full_name = site(owner, name)
        is_biased = name == "attn.scores" and self.key_bias is not None
        return full_name in self.factors or is_biased or self.collects(full_name)

    def __call__(self, owner: Sited, name: str, value: Any) -> Any:
        full_name = site(owner, name)
        if full_name in self.factors:
            factor = self.factors[full_name]
            value = value * (factor if len(factor) == 1 else factor[:, None, None])  # of each head: [B, H, T, d]
        if name == "attn.scores" and self.key_bias is not None:
            value = value + self.key_bias
        if self.collects(full_name):
            self.found[full_name] = value.weights() if isinstance(value, AttentionMap) else value
        return value


@contextmanager
def watching(watcher: Watcher) -> Iterator[Watcher]:
    """The watcher is installed inside the ``with``."""
    before = watch(watcher)
    try:
        yield watcher
    finally:
        watch(before)


class Text(nn.Module):
    """``t5_ids [1, L], clip_ids [1, L] -> txt [1, L, D], pooled [1, D]`` and the values inside both encoders."""

    def __init__(self, t5: T5Encoder, clip: CLIPTextEncoder):
        super().__init__()
        self.t5, self.clip = t5, clip
        self.sites: list[str] = []

    def forward(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, ...]:
        with watching(Watcher(lambda name: True)) as watcher:
            txt = self.t5(t5_ids)
            # as CLIPTextEncoder.forward, whose check of the ids cannot be exported
            states = self.clip.probe("states", self.clip.text_model(clip_ids))
            first_end = (clip_ids == self.clip.config.eos_token_id).int().argmax(dim=1)
            pooled = self.clip.probe("pooled", states[0].index_select(0, first_end))
        self.sites = list(watcher.found)
        return (txt, pooled, *watcher.found.values())


class Step(nn.Module):
    """One model evaluation: the velocity ``[1, N, 64]``; with ``inside``, also the values at all sites.

    img ``[1, N, 64]`` packed latents · txt ``[1, L, D]`` · pooled ``[1, D]`` · t, guidance ``[1]`` · cos, sin
    ``[T, d/2]`` of the rotation of each channel pair · factors ``[K]``, of :func:`factor_sites` in order · key_bias
    ``[T]``.
    """

    def __init__(self, flux: Flux, inside: bool):
        super().__init__()
        self.flux, self.inside = flux, inside
        self.counts = factor_sites(flux.config)
        self.sites: list[str] = []

    def collects(self, name: str) -> bool:
        return self.inside and not name.endswith("attn.rope") and name != "velocity"  # complex; the output

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        pooled: Tensor,
        t: Tensor,
        guidance: Tensor,
        cos: Tensor,
        sin: Tensor,
        factors: Tensor,
        key_bias: Tensor,
    ) -> tuple[Tensor, ...]:
        rope = torch.complex(cos[None], sin[None])  # [1, T, d/2]
        by_site = dict(zip(self.counts, factors.split(list(self.counts.values())), strict=True))
        with watching(Watcher(self.collects, by_site, key_bias)) as watcher:
            velocity = self.flux(img, None, txt, None, t, pooled, guidance, rope=rope)
        self.sites = list(watcher.found)
        return (velocity, *watcher.found.values())


class Decoder(nn.Module):
    """``latent [1, C, h, w] -> image [1, 3, 8 h, 8 w]``; with ``inside``, also the values at the decoder's sites."""

    def __init__(self, ae: AutoEncoder, inside: bool):
        super().__init__()
        self.ae, self.inside = ae, inside
        self.sites: list[str] = []

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        with watching(Watcher(lambda name: self.inside)) as watcher:
            image = self.ae.decode(latent)
        self.sites = list(watcher.found)
        return (image, *watcher.found.values())
