"""FLUX's transformer: noisy image tokens and text tokens in, a velocity for every image token out.

    img, txt  ->  double blocks  ->  [txt, img]  ->  single blocks  ->  img  ->  last layer

Sign and time: t = 1 is noise, t = 0 is the image, x_t = (1 - t) * image + t * noise, and the network predicts
v = noise - image, the direction in which x_t moves as t grows.
Source: black-forest-labs/flux, model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fluxedu.errors import RequestError
from fluxedu.models.attention import rope_table
from fluxedu.models.blocks import DoubleStreamBlock, LastLayer, SingleStreamBlock
from fluxedu.models.config import FluxConfig
from fluxedu.models.modulation import TIMESTEP_DIM, MLPEmbedder, timestep_embedding
from fluxedu.probe import Probed, name_sites

TIMES_AT_ONCE = 8  # times whose modulation is computed in one batch


@dataclass(frozen=True)
class Plan:
    """Everything in a forward pass that depends only on the time, the guidance scale and the pooled text.

    ``terms``: the terms of ``vec`` by name (time, guidance, text), each ``[..., B, D]`` · ``double``, ``single`` and
    ``last``: the modulation of each block. With a leading axis of steps, ``plan[i]`` is the plan of step ``i``.
    """

    terms: dict[str, Tensor]
    vec: Tensor
    double: list[dict[str, Tensor]]
    single: list[Tensor]
    last: Tensor

    def __getitem__(self, step: int) -> Plan:
        return Plan(
            {name: term[step] for name, term in self.terms.items()},
            self.vec[step],
            [{"txt": mods["txt"][step], "img": mods["img"][step]} for mods in self.double],
            [mods[step] for mods in self.single],
            self.last[step],
        )

    def __iter__(self) -> Iterator[Plan]:
        return (self[i] for i in range(self.vec.shape[0]))


class PlanAhead:
    """``plan(t, guidance, pooled)``: the same as :meth:`Flux.plan`, computed for several times in one batch.

    times: those at which the model will be evaluated, in order. A time that is not among them is computed when it is
    requested; with autograd on, each time is computed separately. A new batch replaces the one before it. For one batch
    size, ``guidance`` and ``pooled`` must be the same in every call.
    """

    def __init__(self, flux: Flux, times: list[float]):
        self.flux = flux
        self.times = list(dict.fromkeys(times))
        is_streamed = flux.placement is not None and flux.placement.mode != "full"
        # streamed weights are copied to the device only once
        self.times_at_once = len(self.times) if is_streamed else TIMES_AT_ONCE
        self.plans: dict[int, dict[float, Plan]] = {}  # batch size -> time -> plan

    def __call__(self, t: float, guidance: Tensor | None, pooled: Tensor) -> Plan:
        if torch.is_grad_enabled():
            return self.flux.plan(torch.tensor([t], dtype=torch.float32, device=pooled.device), guidance, pooled)
        plans = self.plans.get(len(pooled), {})
        if t not in plans:
            times = [t]
            if t in self.times:
                start = min(self.times.index(t), max(len(self.times) - self.times_at_once, 0))
                times = self.times[start : start + self.times_at_once]
            timesteps = torch.tensor(times, dtype=torch.float32, device=pooled.device)[:, None]
            plans = dict(zip(times, self.flux.plan(timesteps, guidance, pooled), strict=True))
            self.plans[len(pooled)] = plans
        return plans[t]


class Flux(Probed):
    """The flow transformer of every FLUX.1 variant.

    Names and shapes in the state dict are the official ones, so an official file loads without renaming.
    """

    placement = None  # a fluxedu.memory.Placement where weights are offloaded or quantised

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, dim)
        self.time_in = MLPEmbedder(TIMESTEP_DIM, dim)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIMESTEP_DIM, dim)
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
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        *,
        rope: Tensor | None = None,
        plan: Plan | None = None,
    ) -> Tensor:
        """The velocity of the image tokens, ``[B, N, out_channels]``.

        img ``[B, N, in_channels]`` packed latents · img_ids ``[B, N, 3]`` or ``[N, 3]`` · txt
        ``[B, L, context_in_dim]`` T5 embeddings · txt_ids ``[B, L, 3]`` or ``[L, 3]``, all zero · timesteps ``[B]`` in
        [0, 1], 1 is noise · y ``[B, vec_in_dim]`` CLIP's pooled vector · guidance ``[B]``, required if
        ``config.guidance_embed``, ignored otherwise · rope, plan: what :meth:`rope` and :meth:`plan` return for these
        arguments, if it is known already.
        """
        plan = self.plan(timesteps, guidance, y) if plan is None else plan
        rope = self.rope(img_ids, txt_ids) if rope is None else rope
        return self.velocity(img, txt, rope, plan)

    def rope(self, img_ids: Tensor, txt_ids: Tensor) -> Tensor:
        """The rotations of [text, image], complex ``[..., 1, L + N, d/2]``; the same for every step."""
        ids = torch.cat([txt_ids, img_ids], dim=-2)
        table = rope_table(ids, self.config.axes_dim, self.config.theta)
        return table if self.img_in.weight.dtype == torch.float64 else table.to(ids.device, torch.complex64)

    def plan(self, timesteps: Tensor, guidance: Tensor | None, y: Tensor) -> Plan:
        """The modulation of one pass (``timesteps [B]``) or of several steps (``timesteps [S, 1]``).

        Exactly what :meth:`forward` computes in each step, done ahead of the loop: these layers are 27 % of
        FLUX.1-dev's weights and see a single vector per image.
        """
        if self.config.guidance_embed and guidance is None:
            raise RequestError(
                "this model has a guidance input: pass guidance as a tensor [B], such as torch.full((B,), 3.5)."
            )
        if y is None:
            raise RequestError("this model reads CLIP's pooled vector: pass y, a tensor [B, vec_in_dim].")
        terms = {"time": self.time_in(self._embed(timesteps))}
        if self.config.guidance_embed:
            terms["guidance"] = self.guidance_in(self._embed(guidance))
        terms["text"] = self.vector_in(y.to(self.img_in.weight.dtype))
        expanded = torch.broadcast_tensors(*terms.values())  # each [..., B, D]
        return self._modulation(dict(zip(terms, expanded, strict=True)), sum(expanded))

    def _embed(self, number: Tensor) -> Tensor:
        """``[...] -> [..., TIMESTEP_DIM]``, a time or a guidance scale as the network's input."""
        embedding = timestep_embedding(number.flatten()).to(self.img_in.weight.dtype)
        return embedding.unflatten(0, number.shape)

    def _modulation(self, terms: dict[str, Tensor], vec: Tensor) -> Plan:
        double = [block.plan(vec) for block in self.double_blocks]
        single = [block.plan(vec) for block in self.single_blocks]
        return Plan(terms, vec, double, single, self.final_layer.plan(vec))

    def velocity(self, img: Tensor, txt: Tensor, rope: Tensor, plan: Plan) -> Tensor:
        """One pass over the tokens with known modulation: see :meth:`forward`."""
        self._check_shapes(img, txt, rope)
        plan = self._probe_vec(plan)
        img = self.probe("img_in", self.img_in(img))  # [B, N, D] noisy patches, projected to the transformer's width
        txt = self.probe("txt_in", self.txt_in(txt))  # [B, L, D] text embeddings, projected to the transformer's width
        for block, mods in zip(self.double_blocks, plan.double, strict=True):
            img, txt = block(img, txt, mods, rope)

        txt_len, x = txt.shape[1], torch.cat([txt, img], dim=1)  # [B, L + N, D], text first
        del txt, img  # x is a copy
        for block, mods in zip(self.single_blocks, plan.single, strict=True):
            x = block(x, mods, rope, txt_len)

        velocity = self.final_layer(x[:, txt_len:], plan.last)
        return self.probe("velocity", velocity)  # [B, N, O] predicted velocity, noise minus image, per patch

    def _probe_vec(self, plan: Plan) -> Plan:
        """Pass ``vec`` and its terms through their sites; if one was changed, compute the modulation anew."""
        terms = dict(plan.terms)
        terms["time"] = self.probe("vec.time", terms["time"])  # [B, D] the time's term of vec
        if "guidance" in terms:
            terms["guidance"] = self.probe("vec.guidance", terms["guidance"])  # [B, D] the guidance scale's term
        if "text" in terms:
            terms["text"] = self.probe("vec.text", terms["text"])  # [B, D] the pooled CLIP text's term of vec
        changed = any(terms[name] is not plan.terms[name] for name in terms)
        vec = sum(terms.values()) if changed else plan.vec
        vec = self.probe("vec", vec)  # [B, D] sum of the time, guidance and text embeddings; sets all modulation
        return plan if vec is plan.vec else self._modulation(terms, vec)

    def _check_shapes(self, img: Tensor, txt: Tensor, rope: Tensor) -> None:
        c = self.config
        for name, x, width in (("img", img, c.in_channels), ("txt", txt, c.context_in_dim)):
            if x.ndim != 3 or x.shape[-1] != width:
                raise RequestError(f"{name} must be [batch, tokens, {width}], not {list(x.shape)}.")
        positions, tokens = rope.shape[-2], (txt.shape[1], img.shape[1])
        if positions != sum(tokens):
            counts = f"{tokens[0]} (text) + {tokens[1]} (image) = {sum(tokens)}"
            raise RequestError(f"the ids must have one row per token, {counts}, not {positions}.")
