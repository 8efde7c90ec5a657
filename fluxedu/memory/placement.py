"""Which weights stay on the device and which only visit it, chosen from what is free.

    full             everything stays
    no-modulations   the layers that make shift, scale and gate, 27 % of the flow, visit while a run is planned;
                     the text encoders visit while a prompt is read
    stream           the flow's blocks visit too, all of them or as many as must

All three give the same result to the bit. Needs are counted, not measured: the bytes of weights, and the bytes of
tensors alive at once in a pass on the meta device (:class:`Need`). Not counted are what the CUDA context, its
libraries' workspaces and a fragmented allocator take: ``RESERVE`` of a card is left for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from fluxedu.errors import PlacementError
from fluxedu.memory.peak import FusedAttention, PeakBytes
from fluxedu.memory.quantised import FORMATS, linears
from fluxedu.memory.tiles import TILE
from fluxedu.memory.visits import owned
from fluxedu.models import AutoEncoder, AutoEncoderConfig, CLIPTextEncoder, Flux, FluxConfig, T5Encoder
from fluxedu.models.meta_init import meta_init

MODES = ("auto", "full", "no-modulations", "stream")
GB = 10**9
STEPS = 50  # of a run whose needs are counted
RESERVE = 1.0 * GB


@dataclass(frozen=True)
class Placement:
    """How the weights lie.

    mode: one of ``MODES`` but auto · streamed: how many of the flow's blocks visit · tiled: decode in tiles? ·
    small: what the linear layers of the blocks are quantised to, one of ``quantised.FORMATS``; those that visit
    are not
    """

    mode: str = "full"
    streamed: int = 0
    tiled: bool = False
    small: str | None = None

    def visitors(self, network: nn.Module) -> list[list[nn.Module]]:
        """The modules of one network that visit, in the order in which they run; those in one list fetch ahead."""
        if self.mode == "full":
            return []
        if isinstance(network, Flux):
            return [modulations(network), self._blocks(network)]
        if isinstance(network, T5Encoder):
            blocks = list(network.encoder.block)
            return [[network.shared, *(b.attention.relative_attention_bias for b in blocks[:1]), *blocks]]
        return [[network]] if isinstance(network, CLIPTextEncoder) else []

    def _blocks(self, flux: Flux) -> list[nn.Module]:
        """So many blocks, spread evenly, so that there is something to compute while one travels."""
        blocks = [*flux.double_blocks, *flux.single_blocks]
        count = min(self.streamed, len(blocks))
        return [block for i, block in enumerate(blocks) if (i + 1) * count // len(blocks) > i * count // len(blocks)]

    def away(self, network: nn.Module) -> set[str]:
        """The names of the tensors that stay on the host."""
        ids = {id(p) for group in self.visitors(network) for module in group for p in module.parameters()}
        return {name for name, p in network.named_parameters() if id(p) in ids}

    def made_small(self, network: nn.Module) -> dict[str, nn.Linear]:
        """The linear layers that are quantised, by name."""
        if self.small is None or not isinstance(network, Flux):
            return {}
        away = {module for group in self.visitors(network) for module in group}
        chosen = {m for b in (*network.double_blocks, *network.single_blocks) for m in linears(b, away)}
        return {name: module for name, module in network.named_modules() if module in chosen}

    def held(self, network: nn.Module, size: int) -> tuple[int, int]:
        """Bytes of the weights that stay, ``size`` a number; and of the largest small one when it is made whole."""
        away, small = self.away(network), self.made_small(network)
        whole = [
            p.numel() for n, p in network.named_parameters() if n not in away and n.rpartition(".")[0] not in small
        ]
        shapes = [module.weight.shape for module in small.values()]
        biases = sum(module.out_features for module in small.values() if module.bias is not None)
        least = sum(FORMATS[self.small].held(*shape) for shape in shapes)
        return size * (sum(whole) + biases) + least, size * max((shape.numel() for shape in shapes), default=0)


def modulations(flux: Flux) -> list[nn.Module]:
    """The linear layers that make every shift, scale and gate, in the order in which a plan calls them."""
    double = [block.get_submodule(f"{s}_mod").lin for block in flux.double_blocks for s in block.STREAMS]
    single = [block.modulation.lin for block in flux.single_blocks]
    return [*double, *single, flux.final_layer.adaLN_modulation[1]]


# ---------------------------------------------------------------- what a placement needs


@dataclass(frozen=True)
class Need:
    """Bytes on the device: weights that stay, the most that visit at once, and the activations of each stage."""

    resident: int
    planning: int  # two neighbouring modulations
    step: int  # two neighbouring blocks that visit, one small layer made whole, and the activations of a step
    text: int  # of the encoders
    decode: int  # the autoencoder's activations

    @property
    def peak(self) -> int:
        return self.resident + max(self.planning, self.step, self.text, self.decode)


@dataclass(frozen=True)
class Networks:
    """The four networks without numbers; ``dtype`` is what they are used in."""

    flux: Flux
    ae: AutoEncoder
    clip: CLIPTextEncoder
    t5: T5Encoder
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def official(cls, config: FluxConfig | None = None) -> Networks:
        with meta_init():
            return cls(Flux(config or FluxConfig()), AutoEncoder(), CLIPTextEncoder(), T5Encoder())

    def need(self, placement: Placement, height: int, width: int, words: int) -> Need:
        """Of one picture ``height x width`` with ``words`` text tokens."""
        size = self.dtype.itemsize
        held = [placement.held(network, size) for network in (self.flux, self.ae, self.clip, self.t5)]
        resident, whole = sum(stays for stays, _ in held), held[0][1]
        step, decode = activations(self.flux.config, self.ae.config, height, width, words, self.dtype, placement.tiled)
        rows = size * STEPS * sum(linear.out_features for linear in modulations(self.flux))  # of the plan
        visits = lambda network: [size * n for n in _largest_pairs(placement.visitors(network))]  # noqa: E731
        planning, blocks = visits(self.flux) or (0, 0)
        text = max([*visits(self.clip), *visits(self.t5), 0])
        return Need(resident, planning + rows, blocks + rows + step + whole, text, decode)


def _largest_pairs(groups: list[list[nn.Module]]) -> list[int]:
    """Of each group, the most numbers of two neighbours: one computes, the next one is on its way."""
    apart = {module for group in groups for module in group}
    sizes = [[sum(p.numel() for p in owned(module, apart)) for module in group] for group in groups]
    return [max((a + b for a, b in zip(s, [*s[1:], 0], strict=True)), default=0) if s else 0 for s in sizes]


@lru_cache(maxsize=64)
def activations(
    flux: FluxConfig, ae: AutoEncoderConfig, height: int, width: int, words: int, dtype: torch.dtype, tiled: bool
) -> tuple[int, int]:
    """The most bytes of tensors alive at once, in a step of the flow and in decoding; counted on the meta device.

    One block of each kind is enough: the others run after it and hold no more.
    """
    with meta_init(), torch.no_grad(), FusedAttention():
        network = Flux(flux.with_(depth=min(flux.depth, 1), depth_single_blocks=min(flux.depth_single_blocks, 1)))
        decoder, network = AutoEncoder(ae).to(dtype), network.to(dtype)
        rows, columns = height // ae.downscale, width // ae.downscale
        tokens = rows * columns // 4
        plan = network.plan(torch.empty(1), torch.empty(1), torch.empty(1, flux.vec_in_dim))
        rope = torch.empty(1, words + tokens, flux.head_dim // 2, dtype=torch.complex64)
        img, txt = (
            torch.empty(1, n, w).to(dtype) for n, w in ((tokens, flux.in_channels), (words, flux.context_in_dim))
        )
        with PeakBytes() as step:
            network.velocity(img, txt, rope, plan)
        side = (min(rows, TILE), min(columns, TILE)) if tiled else (rows, columns)
        latent = torch.empty(1, ae.z_channels, *side).to(dtype)
        with PeakBytes() as decode:
            decoder.decode(latent)
    return step.peak, decode.peak


# ---------------------------------------------------------------- choosing


def choose(
    networks: Networks, mode: str, free: float, size: int = 1024, words: int = 512, small: str | None = None
) -> Placement:
    """The placement for ``mode``; for auto, the one that moves least and needs no more than ``free`` bytes.

    Blocks that are quantised (``small``) stay: of all that is small, the least is without the modulations.
    """
    if mode not in MODES:
        raise PlacementError(f"memory must be one of {', '.join(MODES)}, not {mode!r}.")
    blocks = len(networks.flux.double_blocks) + len(networks.flux.single_blocks)
    if small is not None and mode == "stream":
        raise PlacementError('blocks that visit are not quantised: say memory="no-modulations", or leave quantise out.')
    if mode != "auto" and small is None:
        return Placement(mode, blocks if mode == "stream" else 0)
    fits: Callable[[Placement], bool] = lambda p: networks.need(p, size, size, words).peak <= free  # noqa: E731
    if small is not None:
        modes = MODES[1:3] if mode == "auto" else (mode,)
        ways = [Placement(way, tiled=tiled, small=small) for tiled in (False, True) for way in modes]
        return next(filter(fits, ways), ways[-1]) if mode == "auto" else ways[0]
    for placement in (Placement(), Placement("no-modulations")):
        if fits(placement):
            return placement
    tiled = not fits(Placement("stream", blocks))
    low, high = 1, blocks  # the fewest that fit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(Placement("stream", middle, tiled)) else (middle + 1, high)
    return Placement("stream", low, tiled)


def free_bytes(device: torch.device) -> float:
    """What may be used of a device. Of the CPU's, no end: what is mapped the system takes back by itself."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        allowed = whole * torch.cuda.get_per_process_memory_fraction(device) - torch.cuda.memory_reserved(device)
        return min(free, allowed) - RESERVE
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) - RESERVE
    return float("inf")


def describe(placement: Placement, need: Need, free: float, device: torch.device) -> str:
    """One line: what was chosen, why, and what it is predicted to take."""
    what = {
        "full": "everything stays on it",
        "no-modulations": "the modulations visit it while a run is planned, the text encoders while a prompt is read",
        "stream": f"{placement.streamed} of the flow's blocks visit it in turn, the modulations and text encoders too",
    }[placement.mode]
    what += f"; the blocks' weights are {placement.small}" if placement.small else ""
    tiled = "; pictures are decoded in tiles" if placement.tiled else ""
    room = "" if free == float("inf") else f" of {free / GB:.1f} GB free"
    return (
        f"memory={placement.mode!r} on {device}: {what}{tiled}; "
        f"about {need.peak / GB:.1f} GB{room} for a picture of 1024 x 1024 (predicted)."
    )
