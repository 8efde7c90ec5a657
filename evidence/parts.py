"""Notebooks 07 to 09: what becomes of the picture when one part of the trained network works differently?

40 scenes, each with its own seed, in 20 steps. The judge reads each picture. Controls: nothing changed, and another
seed, whose latent is as far away as that of an unrelated picture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from evidence.intervals import difference, median, share
from evidence.prompts import correct
from evidence.scenes import two_shapes
from fluxedu.models.attention import rotate, split_heads
from fluxedu.models.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxedu.models.modulation import layer_norm, modulate


class GateBlends(DoubleStreamBlock):
    """``(1 - gate) x + gate f`` in place of ``x + gate f``."""

    @staticmethod
    def add(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        return (1 - gate) * x + gate * out

    def forward(self, img: Tensor, txt: Tensor, mods: dict[str, Tensor], rope: Tensor) -> tuple[Tensor, Tensor]:
        streams, txt_len = [], txt.shape[1]
        for name, x in (("txt", txt), ("img", img)):
            mod = mods[name].unsqueeze(-2).chunk(6, dim=-1)
            attn, mlp = getattr(self, f"{name}_attn"), getattr(self, f"{name}_mlp")
            streams.append((x, mod, attn, mlp, attn(modulate(layer_norm(x), mod[0], mod[1]))))
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*(stream[-1] for stream in streams), strict=True))
        out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v).transpose(1, 2).flatten(2)
        new = []
        for (x, mod, attn, mlp, _), attn_out in zip(streams, (out[:, :txt_len], out[:, txt_len:]), strict=True):
            x_mid = self.add(x, mod[2], attn.proj(attn_out))
            x_mlp = self.mlp_input(x, x_mid)
            new.append(self.add(x_mid, mod[5], mlp(modulate(layer_norm(x_mlp), mod[3], mod[4]))))
        return new[1], new[0]

    @staticmethod
    def mlp_input(x: Tensor, x_mid: Tensor) -> Tensor:
        return x_mid


class MLPInParallel(GateBlends):
    """The MLP of a double block reads the tokens from before the attention, as in a single block."""

    @staticmethod
    def add(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        return x + gate * out

    @staticmethod
    def mlp_input(x: Tensor, x_mid: Tensor) -> Tensor:
        return x


class MLPAfterAttention(SingleStreamBlock):
    """The MLP of a single block reads the tokens after the attention, as in a double block."""

    def forward(self, x: Tensor, mods: Tensor, rope: Tensor, txt_len: int = 0) -> Tensor:
        shift, scale, gate = mods.unsqueeze(-2).chunk(3, dim=-1)
        dim, weight = x.shape[-1], self.linear2.weight
        q, k, v = split_heads(self.linear1(modulate(layer_norm(x), shift, scale))[..., : 3 * dim], 3, self.num_heads)
        q, k = self.norm(q, k)
        attn_out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v).transpose(1, 2).flatten(2)
        x = x + gate * F.linear(attn_out, weight[:, :dim], self.linear2.bias)
        hidden = F.gelu(self.linear1(modulate(layer_norm(x), shift, scale))[..., 3 * dim :], approximate="tanh")
        return x + gate * F.linear(hidden, weight[:, dim:])


@contextmanager
def swapped(pipe, kind: str, change) -> Iterator[None]:
    """Every block of a kind replaced by ``change(a copy of it)``."""
    with ExitStack() as stack:
        for i, block in enumerate(getattr(pipe.flux, f"{kind}_blocks")):
            stack.enter_context(fe.swap(f"{kind}.{i}", change(copy.deepcopy(block)), pipe))
        yield


def share_weights(pipe, source: str, *parts: str):
    """Both streams of all double blocks use the ``parts`` of the stream ``source``."""

    def change(block: nn.Module) -> nn.Module:
        for part in parts:
            setattr(block, f"{'txt' if source == 'img' else 'img'}_{part}", getattr(block, f"{source}_{part}"))
        return block

    return swapped(pipe, "double", change)


def zero_columns(pipe, columns: slice):
    """``linear2`` of all single blocks with these columns set to 0."""

    def change(block: nn.Module) -> nn.Module:
        block.linear2.weight.data[:, columns] = 0
        return block

    return swapped(pipe, "single", change)


@contextmanager
def reordered(blocks: nn.ModuleList, order: list[int]) -> Iterator[None]:
    before = list(blocks)
    try:
        for i, j in enumerate(order):
            blocks[i] = before[j]
        yield
    finally:
        for i, block in enumerate(before):
            blocks[i] = block


@contextmanager
def rows_exchanged(flux: nn.Module, name_part: str, i: int, j: int) -> Iterator[None]:
    """Groups ``i`` and ``j`` of as many rows as tokens are wide, exchanged in all tensors with ``name_part``."""
    before, dim = flux.state_dict(), flux.config.hidden_size
    altered = {}
    for name, tensor in before.items():
        rows = list(tensor.clone().split(dim))
        if name_part in name:
            rows[i], rows[j] = rows[j], rows[i]
        altered[name] = torch.cat(rows)
    before = {name: tensor.clone() for name, tensor in before.items()}
    try:
        flux.load_state_dict(altered)
        yield
    finally:
        flux.load_state_dict(before)


def changes(pipe) -> dict:
    """What is changed, as context managers by name."""
    dim, single = pipe.flux.config.hidden_size, pipe.flux.single_blocks
    both = ("mod", "attn", "mlp")
    no_text = {"streams": "txt", "queries": "img"}
    return {
        "nothing": nullcontext(),
        "another seed": nullcontext(),
        "double: gate blends": fe.swap("double.*", GateBlends, pipe),
        "double: MLP in parallel": fe.swap("double.*", MLPInParallel, pipe),
        "double: text held": fe.ablate("double.*", streams="txt"),
        "double: image held": fe.ablate("double.*", streams="img"),
        "double: text uses image weights": share_weights(pipe, "img", *both),
        "double: image uses text weights": share_weights(pipe, "txt", *both),
        "double: text uses image MLPs": share_weights(pipe, "img", "mlp"),
        "double: image uses text MLPs": share_weights(pipe, "txt", "mlp"),
        "double: no attention to text": fe.ablate("double.*.attn.map", **no_text),
        "single: no attention to text": fe.ablate("single.*.attn.map", **no_text),
        "single: MLP after attention": fe.swap("single.*", MLPAfterAttention, pipe),
        "single: no attention": zero_columns(pipe, slice(0, dim)),
        "single: no MLP": zero_columns(pipe, slice(dim, None)),
        "single: text held in the last block": fe.ablate(f"single.{len(single) - 1}", streams="txt"),
        "single: text held in all blocks": fe.ablate("single.*", streams="txt"),
        "double blocks exchanged": reordered(pipe.flux.double_blocks, [1, 0]),
        "single blocks reversed": reordered(single, [*range(len(single))][::-1]),
        "no pooled text": fe.ablate("vec.text"),
        "q and k exchanged": rows_exchanged(pipe.flux, "linear1", 0, 1),
        "k and v exchanged": rows_exchanged(pipe.flux, "linear1", 1, 2),
        "last: scale, shift": rows_exchanged(pipe.flux, "final_layer.adaLN_modulation", 0, 1),
        "single: shift, gate": rows_exchanged(pipe.flux, "modulation.lin", 0, 2),
    }


def run(samples: int = 40) -> dict:
    pipe, scenes, table, plain = fe.load(), two_shapes(samples), {}, {}
    for name, change in changes(pipe).items():
        found, latents = [], []
        with change:
            for start in range(0, samples, 8):
                part = range(start, min(start + 8, samples))
                seeds = [seed + 1000 * (name == "another seed") for seed in part]
                out = pipe([scenes[i].prompt for i in part], seed=seeds, trajectory=False, progress=False)
                found += [scenes[i].judged(image) for i, image in zip(part, out.images, strict=True)]
                latents += list(out.latents)
        claims = correct(found)
        plain = plain or {"latents": latents, "claims": claims}
        distances = [float((x - y).norm() / y.norm()) for x, y in zip(latents, plain["latents"], strict=True)]
        table[name] = {
            "everything right": share([verdict.everything for verdict in found]),
            "claims, compared with nothing changed": difference(claims, plain["claims"]),
            "change of the latent": median(distances),
        }
        print(name, {k: round(v["value"], 2) for k, v in table[name].items()}, flush=True)
    return table
