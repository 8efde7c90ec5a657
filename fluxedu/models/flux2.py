"""FLUX.2's transformer: FLUX.1's (flux.py, blocks.py), with the changes below and no other.

    img, txt  ->  double blocks  ->  [txt, img]  ->  single blocks  ->  img  ->  last layer

    what                FLUX.1                                  FLUX.2
    modulation          a layer in each block and stream        three layers for all blocks (SharedModulation)
    vec                 time + guidance + pooled CLIP text      time + guidance; klein: time alone
    MLP                 W2 gelu(W1 x), 4 times as wide          W2 (silu(Wg x) * Wv x), 3 times as wide (SwiGLU)
    biases              in every linear layer                   none
    text                T5; its position ids are all zero       a language model; its position ids count the tokens
    RoPE                (frame, row, column), theta 10,000      (image, row, column, text index), theta 2,000
    image token         16 latent channels x 2 x 2 cells        32 latent channels x 2 x 2 cells

Attention, QKNorm, RoPE, embeddings, the residual streams and all sites are FLUX.1's own code. Tensors have the names of
the official files. Source: black-forest-labs/flux2, model.py; SwiGLU: arXiv 2002.05202.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.errors import RequestError
from fluxedu.models.attention import QKNorm, SelfAttention
from fluxedu.models.blocks import MLP, DoubleStreamBlock, LastLayer, SingleStreamBlock
from fluxedu.models.config import Flux2Config
from fluxedu.models.flux import Flux, Plan
from fluxedu.models.modulation import TIMESTEP_DIM, MLPEmbedder, SplitModulation
from fluxedu.probe import Probed, name_sites


class SwiGLU(nn.Module):
    """``silu(gate) * value``, where gate is the first half of the channels and value the second."""

    def forward(self, x: Tensor) -> Tensor:  # [..., 2 M] -> [..., M]
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class GatedMLP(MLP):
    """Linear, SwiGLU, Linear, without biases: one half of the hidden channels decides how much of the other passes."""

    def __init__(self, dim: int, hidden: int):
        layers = nn.Linear(dim, 2 * hidden, bias=False), SwiGLU(), nn.Linear(hidden, dim, bias=False)
        nn.Sequential.__init__(self, *layers)  # in place of FLUX.1's layers


class SharedModulation(nn.Module):
    """The linear layer that maps ``vec`` to one modulation for all blocks: ``count`` shifts, scales and gates."""

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.lin = nn.Linear(dim, count * dim, bias=False)

    def forward(self, vec: Tensor) -> Tensor:  # [..., D] -> [..., count * D]
        return self.lin(F.silu(vec))


class Flux2DoubleStreamBlock(DoubleStreamBlock):
    """FLUX.1's double block with SwiGLU, without biases, and without modulation layers; ``forward`` is the same."""

    def __init__(self, config: Flux2Config):
        Probed.__init__(self)  # in place of FLUX.1's layers
        self.config = config
        dim = config.hidden_size
        heads = self.num_heads = config.num_heads
        self.img_mod = SplitModulation(double=True)  # no weights: the modulation comes from outside
        self.img_attn = SelfAttention(dim, heads, qkv_bias=False, proj_bias=False)
        self.img_mlp = GatedMLP(dim, config.mlp_hidden)
        self.txt_mod = SplitModulation(double=True)
        self.txt_attn = SelfAttention(dim, heads, qkv_bias=False, proj_bias=False)
        self.txt_mlp = GatedMLP(dim, config.mlp_hidden)


class Flux2SingleStreamBlock(SingleStreamBlock):
    """FLUX.1's single block with SwiGLU, without biases, and without a modulation layer; ``forward`` is the same.

    q, k, v, gate, value = linear1(modulate(LN(x)))
    x = x + modulation_gate * linear2([attention(q, k, v), silu(gate) * value])
    """

    def __init__(self, config: Flux2Config):
        Probed.__init__(self)  # in place of FLUX.1's layers
        self.config = config
        dim, self.num_heads = config.hidden_size, config.num_heads
        self.widths = [3 * dim, 2 * config.mlp_hidden]  # of linear1's output: qkv, gate and value
        self.linear1 = nn.Linear(dim, sum(self.widths), bias=False)
        self.linear2 = nn.Linear(dim + config.mlp_hidden, dim, bias=False)
        self.norm = QKNorm(config.head_dim)
        self.swiglu = SwiGLU()
        self.modulation = SplitModulation(double=False)  # no weights: the modulation comes from outside

    def activation(self, hidden: Tensor) -> Tensor:  # [B, T, 2 M] -> [B, T, M]
        return self.swiglu(hidden)


class Flux2(Flux):
    """The flow transformer of every FLUX.2 variant: ``Flux2(Flux2Config.variant("klein-4b"))``.

    Names and shapes in the state dict are the official ones, so an official file loads without renaming. Sites have the
    names that they have in FLUX.1 where they mean the same: a block's modulation passes ``double.3.img_mod.gate1`` here
    too, and a change there affects only this block, although its weights are shared.

    ``forward`` is FLUX.1's, with these arguments: img_ids ``[N, 4]``, (image, row, column, 0), where image is 0 for the
    picture that is drawn and 10, 20, ... for reference pictures · txt ``[B, L, context_in_dim]``, hidden states of the
    language model · txt_ids ``[L, 4]``, (0, 0, 0, index) · y is not read: FLUX.2 has no pooled vector.
    """

    def __init__(self, config: Flux2Config):
        Probed.__init__(self)  # in place of FLUX.1's layers
        self.config = config
        dim = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, dim, bias=False)
        self.time_in = MLPEmbedder(TIMESTEP_DIM, dim, bias=False)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIMESTEP_DIM, dim, bias=False)
        self.txt_in = nn.Linear(config.context_in_dim, dim, bias=False)
        self.double_stream_modulation_img = SharedModulation(dim, 6)
        self.double_stream_modulation_txt = SharedModulation(dim, 6)
        self.single_stream_modulation = SharedModulation(dim, 3)
        self.double_blocks = nn.ModuleList(Flux2DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(Flux2SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = LastLayer(dim, config.out_channels, bias=False)
        name_sites(self)

    def plan(self, timesteps: Tensor, guidance: Tensor | None = None, y: Tensor | None = None) -> Plan:
        """The modulation of one pass (``timesteps [B]``) or of several steps (``timesteps [S, 1]``).

        y: ``[B, 0]``, from which only the number of images is read.
        """
        if self.config.guidance_embed and guidance is None:
            raise RequestError(
                "this model has a guidance input: pass guidance as a tensor [B], such as torch.full((B,), 4.0)."
            )
        timesteps = timesteps if y is None else timesteps.expand(*timesteps.shape[:-1], len(y))
        terms = {"time": self.time_in(self._embed(timesteps))}
        if self.config.guidance_embed:
            terms["guidance"] = self.guidance_in(self._embed(guidance))
        expanded = torch.broadcast_tensors(*terms.values())  # each [..., B, D]
        return self._modulation(dict(zip(terms, expanded, strict=True)), sum(expanded))

    def _modulation(self, terms: dict[str, Tensor], vec: Tensor) -> Plan:
        double = {"txt": self.double_stream_modulation_txt(vec), "img": self.double_stream_modulation_img(vec)}
        single = self.single_stream_modulation(vec)
        depth, depth_single = self.config.depth, self.config.depth_single_blocks
        return Plan(terms, vec, [double] * depth, [single] * depth_single, self.final_layer.plan(vec))
