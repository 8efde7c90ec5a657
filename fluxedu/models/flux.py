"""FLUX's transformer: noisy image tokens and text tokens in, a velocity for every image token out.

    img, txt  ->  double blocks  ->  [txt, img]  ->  single blocks  ->  img  ->  final layer

Sign and time: t = 1 is noise, t = 0 is the picture, x_t = (1 - t) * picture + t * noise, and the
network predicts v = noise - picture, the direction in which x_t moves as t grows.
Source: black-forest-labs/flux, model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluxedu.models.attention import rope_table
from fluxedu.models.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxedu.models.config import FluxConfig
from fluxedu.models.modulation import WAVES, MLPEmbedder, modulate, normalised, timestep_embedding
from fluxedu.probe import Probed, name_sites


class LastLayer(Probed):
    """Modulate once more (shift, scale, no gate) and map each token to its patch of velocity."""

    def __init__(self, dim: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def plan(self, vec: Tensor) -> Tensor:  # [..., D] -> [..., 2 D]
        return self.adaLN_modulation(vec)

    def forward(self, x: Tensor, mods: Tensor) -> Tensor:  # [B, N, D] -> [B, N, out]
        shift, scale = mods.unsqueeze(-2).chunk(2, dim=-1)
        shift, scale = self.probe("shift", shift), self.probe("scale", scale)
        normed = self.probe("norm", normalised(x))
        return self.linear(self.probe("modulated", modulate(normed, shift, scale)))


@dataclass(frozen=True)
class Plan:
    """Everything of a forward pass that depends on the time, the guidance and the pooled text only.

    ``parts`` are the summands of ``vec`` (each ``[..., B, D]``); ``double``, ``single`` and ``last``
    hold the modulation rows of the blocks. With a leading axis of steps, ``plan[i]`` is step ``i``'s.
    """

    parts: dict[str, Tensor]
    vec: Tensor
    double: list[dict[str, Tensor]]
    single: list[Tensor]
    last: Tensor

    def __getitem__(self, step: int) -> Plan:
        return Plan(
            {name: part[step] for name, part in self.parts.items()},
            self.vec[step],
            [{s: row[step] for s, row in rows.items()} for rows in self.double],
            [row[step] for row in self.single],
            self.last[step],
        )

    def __iter__(self) -> Iterator[Plan]:
        return (self[i] for i in range(self.vec.shape[0]))


class Flux(Probed):
    """The flow transformer of every FLUX.1 variant.

    State-dict names and shapes are the official ones, so an official file loads with no rename.
    Raises ConfigError for a config that describes no network.
    """

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, dim)
        self.time_in = MLPEmbedder(WAVES, dim)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(WAVES, dim)
        self.txt_in = nn.Linear(config.context_in_dim, dim)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(dim, config.out_channels)
        name_sites(self)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity ``[B, N, out_channels]`` of the image tokens.

        img ``[B, N, in_channels]`` packed latents · img_ids ``[B, N, 3]`` or ``[N, 3]`` · txt
        ``[B, L, context_in_dim]`` T5 tokens · txt_ids ``[B, L, 3]`` or ``[L, 3]``, all zero · timesteps
        ``[B]`` in [0, 1], 1 being noise · y ``[B, vec_in_dim]`` CLIP's pooled vector · guidance ``[B]``,
        needed exactly when ``config.guidance_embed`` (without it, a guidance is ignored).
        """
        plan = self.plan(timesteps, guidance, y)
        return self.velocity(img, txt, self.rope(img_ids, txt_ids), plan)

    def rope(self, img_ids: Tensor, txt_ids: Tensor) -> Tensor:
        """The table of turns for [text, image]: complex ``[..., 1, L + N, d/2]``; once per shape."""
        ids = torch.cat([txt_ids, img_ids], dim=-2)
        table = rope_table(ids, self.config.axes_dim, self.config.theta)
        return table if self.img_in.weight.dtype == torch.float64 else table.to(ids.device, torch.complex64)

    def plan(self, timesteps: Tensor, guidance: Tensor | None, y: Tensor) -> Plan:
        """All modulation of one pass (``timesteps [B]``) or of a whole run (``timesteps [S, 1]``).

        Exactly what :meth:`forward` would compute in each step, done once: these layers are 27 % of
        the weights and see one vector a picture.
        """
        if self.config.guidance_embed and guidance is None:
            raise ValueError("this model has guidance as an input: give guidance, a tensor [B] (3.5 is usual).")
        dtype = self.img_in.weight.dtype
        wave = lambda t: timestep_embedding(t.flatten()).to(dtype).unflatten(0, t.shape)  # noqa: E731
        parts = {"time": self.time_in(wave(timesteps))}
        if self.config.guidance_embed:
            parts["guidance"] = self.guidance_in(wave(guidance))
        parts["text"] = self.vector_in(y.to(dtype))
        parts = dict(zip(parts, torch.broadcast_tensors(*parts.values()), strict=True))
        return self._modulations(sum(parts.values()), parts)

    def _modulations(self, vec: Tensor, parts: dict[str, Tensor]) -> Plan:
        double = [block.plan(vec) for block in self.double_blocks]
        single = [block.plan(vec) for block in self.single_blocks]
        return Plan(parts, vec, double, single, self.final_layer.plan(vec))

    def velocity(self, img: Tensor, txt: Tensor, rope: Tensor, plan: Plan) -> Tensor:
        """One pass over the tokens, the modulation being known: see :meth:`forward`."""
        self._check(img, txt, rope)
        plan = self._seen(plan)
        img = self.probe("img_in", self.img_in(img))
        txt = self.probe("txt_in", self.txt_in(txt))
        for block, mods in zip(self.double_blocks, plan.double, strict=True):
            img, txt = block(img, txt, mods, rope)
        words, x = txt.shape[1], torch.cat([txt, img], dim=1)  # text first
        del txt, img
        for block, mods in zip(self.single_blocks, plan.single, strict=True):
            x = block(x, mods, rope, words)
        return self.probe("velocity", self.final_layer(x[:, words:], plan.last))

    def _seen(self, plan: Plan) -> Plan:
        """Pass ``vec`` and its summands through their sites; redo the modulation if one was changed."""
        parts = {name: self.probe(f"vec.{name}", part) for name, part in plan.parts.items()}
        changed = any(parts[name] is not plan.parts[name] for name in parts)
        summed = sum(parts.values()) if changed else plan.vec
        vec = self.probe("vec", summed)
        return plan if vec is plan.vec else self._modulations(vec, parts)

    def _check(self, img: Tensor, txt: Tensor, rope: Tensor) -> None:
        c = self.config
        for name, x, width in (("img", img, c.in_channels), ("txt", txt, c.context_in_dim)):
            if x.ndim != 3 or x.shape[-1] != width:
                raise ValueError(f"{name} must be [batch, tokens, {width}], not {list(x.shape)}.")
        positions, tokens = rope.shape[-2], (txt.shape[1], img.shape[1])
        if positions != sum(tokens):
            raise ValueError(f"the ids name {positions} positions, but there are {tokens} (text, image) tokens.")
