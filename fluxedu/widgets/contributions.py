"""What each layer adds: attention and MLP apart, in every block, for every token and step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxedu.instruments.lenses.run import blocks_of, recorded
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.models.attention import merge_heads
from fluxedu.models.blocks import SingleStreamBlock
from fluxedu.sampling.pipeline import FluxPipeline, Output
from fluxedu.widgets.asked import checked
from fluxedu.widgets.controls import Choice
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.paint import Pixels8, heat, over, over_stops, picture, stretched
from fluxedu.widgets.panels import Lines, Pixels

PARTS = ("attention", "MLP", "together")
STREAMS = ("image", "text")
SITES = (
    "double.*.img", "double.*.txt", "double.*.*_contribution", "single.*.x", "single.*.heads", "single.*.mlp_hidden",
    "single.*.gate",
)  # fmt: skip


def halves(block: SingleStreamBlock, heads: Tensor, hidden: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """What a single block's attention and its MLP add, ``[..., T, D]`` each: ``linear2``'s first ``D`` columns read the
    one, the rest the other. The bias, which belongs to neither, goes with the MLP.

    heads ``[..., H, T, d]`` · hidden ``[..., T, M]`` · gate ``[..., 1, D]``.
    """
    weight, bias, dim = block.linear2.weight, block.linear2.bias, block.linear2.out_features
    heard = merge_heads(heads.flatten(0, -4)).view(*hidden.shape[:-1], dim)
    if len(weight) != dim:  # 4 bits lie packed and have no columns: the layer is asked, the other half being zero
        first = block.linear2(torch.cat([heard, torch.zeros_like(hidden)], dim=-1))
        second = block.linear2(torch.cat([torch.zeros_like(heard), hidden], dim=-1))
        return gate * (first if bias is None else first - bias), gate * second
    return gate * F.linear(heard, weight[:, :dim]), gate * F.linear(hidden, weight[:, dim:], bias)


def shares(pipe: FluxPipeline, prompt: str, **asked) -> tuple[Named, Named, Output]:
    """How large each token is as it enters a block, and what it is then given: root mean squares over channels.

    Axes ``block, step, token`` and ``block, part, step, token``, text first; parts are PARTS, the last being the sum of
    the two as vectors, which is smaller than the sum of their sizes where they work against each other. They are
    measured while the run goes on, so no more than these four numbers a token is kept.
    """
    out, rec = recorded(pipe, prompt, *SITES, asked=checked(asked), reduce=_Sizes(pipe))
    names = blocks_of(pipe)
    sizes = torch.stack([_kept(rec, name, "", "x") for name in names])
    given = torch.stack([_kept(rec, name, "_mlp_contribution", "heads") for name in names]).transpose(1, 2)
    first = "double.0.img" if "double.0.img" in rec else "single.0.x"
    coords = {"block": names, "step": rec[first].coords["step"]}
    return (
        Named(sizes, ("block", "step", "token"), coords),
        Named(given, ("block", "part", "step", "token"), coords | {"part": list(PARTS)}),
        out,
    )


class _Sizes:
    """A reduction: the root mean squares of the tokens that enter a block ``[1, T]``; and of what they are given
    ``[1, part, T]``, where the last value passes of which that is made. The others are put by until then.
    """

    site = ""  # told by the recorder

    def __init__(self, pipe: FluxPipeline):
        self.pipe, self.held = pipe, {}

    def __call__(self, value: Named) -> Named | None:
        block, name = self.site.rsplit(".", 1)
        if name in ("img", "txt", "x"):
            return Named(_rms(value.tensor), ("batch", "token"))
        self.held[name] = value.tensor
        joint = name == "heads"
        needed = ("heads", "mlp_hidden", "gate") if joint else (name.replace("mlp", "attn"), name)
        if not (joint or name.endswith("mlp_contribution")) or not all(part in self.held for part in needed):
            return None
        parts = [self.held.pop(part) for part in needed]
        attention, mlp = halves(_single(self.pipe, block), *parts) if joint else parts
        sizes = [_rms(x) for x in (attention, mlp, attention + mlp)]
        return Named(torch.stack(sizes, dim=1), ("batch", "part", "token"))


def _single(pipe: FluxPipeline, name: str) -> SingleStreamBlock:
    return pipe.flux.single_blocks[int(name.removeprefix("single."))]


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean(-1).sqrt()


def _kept(rec: record, block: str, double: str, single: str) -> Tensor:
    """What was kept of a block, ``[S, ..., T]``: of a double one of both streams, text first."""
    names = [f"{stream}{double}" for stream in ("txt", "img")] if block.startswith("double") else [single]
    return torch.cat([rec[f"{block}.{name}"].tensor for name in names], dim=-1)


def over_tokens(values: Tensor, tokens: slice) -> Tensor:
    """The root mean square over some tokens, the last axis."""
    return values[..., tokens].square().mean(-1).sqrt()


def contributions_view(
    sizes: Named,
    given: Named,
    words: int,
    grid: tuple[int, int],
    image: Pixels8,
    part: str,
    stream: str,
    cell: tuple[int, int],
) -> View:
    """Shares over depth and time, one block's two parts over time, and where in the picture they are.

    ``sizes``, ``given``: from :func:`shares` · ``cell``: block and step · a share is the size of what is added, beside
    the size of the tokens it is added to.
    """
    blocks, times = sizes.coords["block"], sizes.coords["step"]
    tokens = slice(words, None) if stream == "image" else slice(0, words)
    share = over_tokens(given.tensor, tokens) / over_tokens(sizes.tensor, tokens)[:, None]  # [block, part, step]
    block, step = cell
    table = share[:, PARTS.index(part)]
    most = min(float(table.max()), 1.0)  # the first block writes on almost empty tokens, many times their size
    series = {name: share[block, i].tolist() for i, name in enumerate(PARTS)}
    patches = given.tensor[block, PARTS.index(part), step, words:].view(grid)
    panels = [
        Pixels(
            f"what {part} adds to the {stream}: a row a block, a column a step, noise at the left",
            stretched(heat(table, most, "viridis"), 240, 260), tuple(table.shape), cell,
            ("0", f"{most:.0%} of the token or more"), "viridis", blocks,
            pointer="cell",
        ),
        Lines(f"{blocks[block]} over time, {stream} tokens", times, series, "time (1 is noise)",
              "added, beside the token", times[step]),
        Pixels(
            f"where {blocks[block]}'s {part} adds to the picture, at t = {times[step]:.2f}", over(image, patches),
            key=("0", f"{patches.max():.2f}, root mean square"), colours=over_stops(),
        ),
    ]  # fmt: skip
    a, m, both = share[block, :, step].tolist()
    text = (
        f"{blocks[block]} at t = {times[step]:.2f}: beside the {stream} tokens, attention adds {a:.0%} of their size, "
    )
    return View(panels, text + f"the MLP {m:.0%}, both together {both:.0%}{_said(a, m, both)}.")


def _said(attention: float, mlp: float, both: float) -> str:
    """How the two point, as their cosine tells."""
    cosine = (both**2 - attention**2 - mlp**2) / max(2 * attention * mlp, 1e-12)
    way = "pull the same way" if cosine > 0.2 else "work against each other" if cosine < -0.2 else "go separate ways"
    return f"; the two {way} (cosine {round(cosine, 1) + 0.0:.1f})"


def contributions(pipe: FluxPipeline, prompt: str, **asked) -> Explorer:
    """What attention and MLP of every block add to the image's and the text's tokens while ``prompt`` is drawn.

    Also in single blocks, where one matrix makes both: it is read in two halves, see :func:`halves`.
    """
    sizes, given, out = shares(pipe, prompt, **asked)
    words, grid = pipe.prompt_encoder.t5_tokenizer.length, tuple(n // 2 for n in out.latents.shape[-2:])
    image, depth = picture(out.images[0]), pipe.flux.config.depth

    def draw(part: int, stream: int, cell: tuple[int, int]) -> View:
        return contributions_view(sizes, given, words, grid, image, PARTS[part], STREAMS[stream], cell)

    controls = [Choice("part", "part", PARTS), Choice("stream", "stream", STREAMS)]
    start = {"cell": (depth, len(sizes.coords["step"]) // 2)}
    return Explorer("Contributions", controls, draw, start, widths=[3.4, 3.4, 2.8])
