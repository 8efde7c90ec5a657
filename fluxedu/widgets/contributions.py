"""What attention and the MLP of each block add to the residual stream, for every token and step."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.instruments.lenses.run import blocks_of, enough_steps, few_steps_note, run_recorded
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.recording import StepKey
from fluxedu.instruments.reductions import StepReduction
from fluxedu.models.attention import merge_heads
from fluxedu.models.blocks import SingleStreamBlock
from fluxedu.plots import TIME_LABEL
from fluxedu.sampling.pipeline import FluxPipeline, Output
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Choice, Explorer, Try, View, check_request, explorer
from fluxedu.widgets.panels import RGB, Lines, Pixels, overlay, overlay_colours, resize_table, sequential, to_rgb

SOURCES = ("attention", "MLP", "sum")
STREAMS = ("image", "text")
DOUBLE_SITES = ("double.*.img", "double.*.txt", "double.*.*_contribution")
SINGLE_SITES = ("single.*.x", "single.*.heads", "single.*.mlp_hidden", "single.*.gate")


def split_contribution(
    block: SingleStreamBlock, heads: Tensor, mlp_hidden: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor]:
    """What the attention and the MLP of a single-stream block add, each ``[..., T, D]``.

    One matrix, ``linear2``, makes both: its first ``D`` columns read the attention output, the others the MLP's hidden
    units. Its bias belongs to neither and is counted with the MLP.

    heads ``[..., H, T, d]`` · mlp_hidden ``[..., T, M]`` · gate ``[..., 1, D]``.
    """
    weight, bias, dim = block.linear2.weight, block.linear2.bias, block.linear2.out_features
    attn_out = merge_heads(heads.flatten(0, -4)).view(*mlp_hidden.shape[:-1], dim)
    if len(weight) != dim:  # packed 4-bit weights have no columns: run the layer with the other half set to zero
        attention = block.linear2(torch.cat([attn_out, torch.zeros_like(mlp_hidden)], dim=-1))
        mlp = block.linear2(torch.cat([torch.zeros_like(attn_out), mlp_hidden], dim=-1))
        return gate * (attention if bias is None else attention - bias), gate * mlp
    return gate * F.linear(attn_out, weight[:, :dim]), gate * F.linear(mlp_hidden, weight[:, dim:], bias)


def measure_contributions(pipe: FluxPipeline, prompt: str, **request) -> tuple[Named, Named, Output]:
    """Sizes of the tokens that enter each block, sizes of what the block adds to them, and the run itself.

    A size is a root mean square over channels. Axes ``block, step, token`` and ``block, source, step, token``, text
    tokens first; the sources are attention, the MLP, and the sum of both vectors, which is smaller than the sum of
    their sizes if they point in different directions. Only these four numbers per token are kept during the run.
    """
    out, rec = run_recorded(
        pipe, prompt, *DOUBLE_SITES, *SINGLE_SITES, options=check_request(request), reduce=_Sizes(pipe)
    )
    names, sizes, added = blocks_of(pipe), [], []
    for name in names:
        if name.startswith("double"):
            sizes.append(_text_and_image(rec, name, ""))
            added.append(_text_and_image(rec, name, "_mlp_contribution"))
        else:
            sizes.append(rec[f"{name}.x"].tensor)
            added.append(rec[f"{name}.heads"].tensor)
    coords = {"block": names, "step": rec["double.0.img" if "double.0.img" in rec else "single.0.x"].coords["step"]}
    sizes = Named(torch.stack(sizes), ("block", "step", "token"), coords)
    added = torch.stack(added).transpose(1, 2)
    return sizes, Named(added, ("block", "source", "step", "token"), coords | {"source": list(SOURCES)}), out


def _text_and_image(rec: record, block: str, site: str) -> Tensor:
    return torch.cat([rec[f"{block}.txt{site}"].tensor, rec[f"{block}.img{site}"].tensor], dim=-1)


class _Sizes(StepReduction):
    """A reduction to root mean squares: of the tokens that enter a block, ``[1, T]``, and of what it adds to them,
    ``[1, source, T]``. The latter is computed when the last of the values it needs passes; the others wait in ``held``.
    """

    def __init__(self, pipe: FluxPipeline):
        self.pipe, self.held = pipe, {}

    def __call__(self, value: Named, site: str, key: StepKey) -> Named | None:
        block, name = site.rsplit(".", 1)
        if name in ("img", "txt", "x"):
            return Named(_rms(value.tensor), ("batch", "token"))
        self.held[name] = value.tensor
        if name.endswith("mlp_contribution"):
            needed = (name.replace("mlp", "attn"), name)
        elif name == "heads":
            needed = ("heads", "mlp_hidden", "gate")
        else:
            return None
        if not all(part in self.held for part in needed):
            return None
        values = [self.held.pop(part) for part in needed]
        if name == "heads":
            values = split_contribution(self.pipe.flux.single_blocks[int(block.removeprefix("single."))], *values)
        attention, mlp = values
        sizes = torch.stack([_rms(attention), _rms(mlp), _rms(attention + mlp)], dim=1)
        return Named(sizes, ("batch", "source", "token"))


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean(-1).sqrt()


def rms_over_tokens(values: Tensor, tokens: slice) -> Tensor:
    """The root mean square over some tokens, which are the last axis."""
    return values[..., tokens].square().mean(-1).sqrt()


def contributions_view(
    sizes: Named,
    added: Named,
    txt_len: int,
    grid: tuple[int, int],
    image: RGB,
    source: str,
    stream: str,
    cell: tuple[int, int],
) -> View:
    """Contributions over depth and time, one block's over time, and where in the image they are large.

    ``sizes``, ``added``: from :func:`measure_contributions` · ``cell``: block and step · shares are sizes of what is
    added, divided by the size of the tokens it is added to.
    """
    blocks, times = sizes.coords["block"], sizes.coords["step"]
    tokens = slice(txt_len, None) if stream == "image" else slice(0, txt_len)
    shares = rms_over_tokens(added.tensor, tokens) / rms_over_tokens(sizes.tensor, tokens)[:, None]
    (block, step), chosen = cell, SOURCES.index(source)
    name = blocks[block].replace(".", " ")
    table = shares[:, chosen]  # [block, step]
    series = {kind: shares[block, i].tolist() for i, kind in enumerate(SOURCES)}
    patches = added.tensor[block, chosen, step, txt_len:].view(grid)
    panels = [
        Pixels(
            f"Size of what {source} adds to {stream} tokens, by block and time",
            # a scale for each row: the first block adds many times the size of its small input tokens
            resize_table(sequential(table, None, "viridis", "row"), 240, 260), tuple(table.shape), cell,
            ("0", "largest of the row"), "viridis", blocks, [f"t={t:.2f}" for t in times],
            unit="share of the token's size", axes=("block", "time"), pointer="cell",
        ),
        Lines(f"Block {name} over time, {stream} tokens", times, series, TIME_LABEL, "share of the token's size",
              times[step]),
        Pixels(
            f"Size of what {source} of {name} adds to each patch, t = {times[step]:.2f}",
            overlay(image, patches), key=("0", f"{patches.max():.2f}"), colours=overlay_colours(),
            unit="root mean square over channels",
        ),
    ]  # fmt: skip
    attention, mlp, both = shares[block, :, step].tolist()
    cosine = (both**2 - attention**2 - mlp**2) / max(2 * attention * mlp, 1e-12)
    relation = "similar" if cosine > 0.2 else "opposite" if cosine < -0.2 else "unrelated"
    return View(
        panels,
        f"Block {name} at t = {times[step]:.2f}: relative to the {stream} tokens, attention adds {attention:.0%}, "
        f"the MLP {mlp:.0%}, both together {both:.0%}; the two point in {relation} directions "
        f"(cosine {round(cosine, 1) + 0.0:.1f}).",
    )


@explorer(example=lambda pipe: contributions(pipe, EXAMPLE_PROMPT, steps=enough_steps(pipe), progress=False))
def contributions(pipe: FluxPipeline, prompt: str, **request) -> Explorer:
    """What attention and the MLP of every block add to image and text tokens while ``prompt`` is drawn.

    This takes one run. In single-stream blocks one matrix makes both; :func:`split_contribution` reads them apart.
    """
    sizes, added, out = measure_contributions(pipe, prompt, **request)
    txt_len, grid = pipe.prompt_encoder.tokenizer.length, tuple(n // 2 for n in out.latents.shape[-2:])
    image, note = to_rgb(out.images[0]), few_steps_note(pipe, request)

    def draw(source: int, stream: int, cell: tuple[int, int]) -> View:
        view = contributions_view(sizes, added, txt_len, grid, image, SOURCES[source], STREAMS[stream], cell)
        return replace(view, text=view.text + note)

    controls = [Choice("source", "added by", SOURCES), Choice("stream", "to the tokens of the", STREAMS)]
    blocks, steps = len(sizes.coords["block"]), len(sizes.coords["step"])
    return Explorer(
        "How much do attention and the MLP add in each block?",
        controls,
        draw,
        {"cell": (pipe.flux.config.depth, steps // 2)},  # the first single-stream block
        widths=[3.4, 3.4, 2.8],
        instruction="Point at a block and a time in the table, or press play, to see what that block adds over time.",
        tries=[
            Try("Does the MLP add in the same blocks?", source="MLP"),
            Try("Which blocks change the text tokens?", stream="text"),
            Try("Where does the last block add at the end?", cell=(blocks - 1, steps - 1)),
        ],
        play="cell",
    )
