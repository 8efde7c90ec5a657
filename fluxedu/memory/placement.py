"""Which weights stay on the device and which are streamed to it, chosen from the memory that is free.

    full             all weights stay on the device
    no-modulations   the layers that compute shift, scale and gate (27 % of the flow) are streamed before the steps,
                     the text encoders while a prompt is encoded
    stream           blocks of the flow are streamed in every step too: all of them, or as many as necessary

All three give the same result, exact to the bit. What they need is counted, not measured: the bytes of the weights, and
the bytes of tensors that are alive at once in a pass on the meta device (:class:`Need`).
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluxedu.checkpoints.layouts import MODELS
from fluxedu.errors import OutOfMemory, PlacementError, check_choice, check_integer, checked
from fluxedu.memory.quantised import FORMATS, check_format, linear_layers
from fluxedu.models import AutoEncoder, CLIPTextEncoder, Flux, Flux2, FluxConfig, T5Encoder
from fluxedu.models.config import PyramidConfig, TransformerConfig
from fluxedu.models.meta_init import meta_init

MODES = ("auto", "full", "no-modulations", "stream")
CARDS = (80, 24, 16, 12, 8)  # GB
GB = 10**9
TILE = 64  # side of a tile in latent cells, where images are decoded in tiles: 512 pixels
STEPS = 50  # of the run whose needs are counted
RESERVE = 1.0 * GB  # for the CUDA context, its libraries and fragmentation, which are not counted


@dataclass(frozen=True)
class Placement:
    """Where the weights are.

    mode: one of ``MODES`` except auto · streamed: how many blocks of the flow are streamed · tiled: whether images are
    decoded in tiles · quantised: the format of the blocks' linear layers, one of ``quantised.FORMATS``; layers that are
    streamed keep their dtype
    """

    mode: str = "full"
    streamed: int = 0
    tiled: bool = False
    quantised: str | None = None

    def streamed_modules(self, network: nn.Module) -> list[list[nn.Module]]:
        """The modules of a network that are streamed, in the order in which they run.

        There are up to two lists; within a list, each module is fetched while the one before it computes.
        """
        if self.mode == "full":
            return []
        if isinstance(network, Flux):
            return [modulations(network), self._streamed_blocks(network)]
        if isinstance(network, T5Encoder):
            blocks = list(network.encoder.block)
            biases = [block.attention.relative_attention_bias for block in blocks[:1]]
            return [[network.shared, *biases, *blocks]]
        if isinstance(network, CLIPTextEncoder):
            return [[network]]
        is_language_model = hasattr(network, "embed_tokens")  # of transformers, for FLUX.2
        return [[network.embed_tokens, *network.layers]] if is_language_model else []

    def _streamed_blocks(self, flux: Flux) -> list[nn.Module]:
        """``streamed`` blocks, evenly spaced, so that others compute while one is copied."""
        blocks = _blocks(flux)
        count = min(self.streamed, len(blocks))
        return [block for i, block in enumerate(blocks) if (i + 1) * count // len(blocks) > i * count // len(blocks)]

    def streamed_names(self, network: nn.Module) -> set[str]:
        """The names of the parameters that stay on the host."""
        modules = [module for group in self.streamed_modules(network) for module in group]
        ids = {id(parameter) for module in modules for parameter in module.parameters()}
        return {name for name, parameter in network.named_parameters() if id(parameter) in ids}

    def quantised_layers(self, network: nn.Module) -> dict[str, nn.Linear]:
        """The linear layers that are quantised, by name."""
        if self.quantised is None or not isinstance(network, Flux):
            return {}
        streamed = {module for group in self.streamed_modules(network) for module in group}
        layers = {layer for block in _blocks(network) for layer in linear_layers(block, streamed)}
        return {name: module for name, module in network.named_modules() if module in layers}

    def dequantised_bytes(self, network: nn.Module, itemsize: int) -> int:
        """Bytes of the largest quantised weight, which is dequantised when its layer is called."""
        return itemsize * max((layer.weight.numel() for layer in self.quantised_layers(network).values()), default=0)

    def resident_bytes(self, network: nn.Module, itemsize: int) -> int:
        """Bytes of the weights that stay on the device, with ``itemsize`` bytes for a number that is not quantised."""
        streamed, quantised = self.streamed_names(network), self.quantised_layers(network)
        total = 0
        for name, parameter in network.named_parameters():
            layer, _, leaf = name.rpartition(".")
            if leaf == "weight" and layer in quantised:
                total += FORMATS[self.quantised].nbytes(*parameter.shape)
            elif name not in streamed:
                total += itemsize * parameter.numel()
        return total


@checked(PlacementError)
def modulations(flux: Flux) -> list[nn.Module]:
    """The linear layers that compute every shift, scale and gate, in the order in which a plan calls them."""
    if isinstance(flux, Flux2):  # shared by all blocks
        shared = flux.double_stream_modulation_txt, flux.double_stream_modulation_img, flux.single_stream_modulation
        return [*(layer.lin for layer in shared), flux.final_layer.adaLN_modulation[1]]
    double = [mod.lin for block in flux.double_blocks for mod in (block.txt_mod, block.img_mod)]
    single = [block.modulation.lin for block in flux.single_blocks]
    return [*double, *single, flux.final_layer.adaLN_modulation[1]]


def own_parameters(module: nn.Module, others: Collection[nn.Module] = ()) -> Iterator[nn.Parameter]:
    """The parameters of a module and of all below it, except those of the modules ``others`` below it."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if child not in others:
            yield from own_parameters(child, others)


def _blocks(flux: Flux) -> list[nn.Module]:
    return [*flux.double_blocks, *flux.single_blocks]


# ---------------------------------------------------------------- what a placement needs


@dataclass(frozen=True)
class Need:
    """Bytes on the device: the weights that stay, and what each stage of a run needs in addition."""

    resident: int
    planning: int  # two consecutive modulation layers, and the plan
    step: int  # two consecutive streamed blocks, one dequantised layer, the plan, and the activations of a step
    text: int  # the text encoders
    decode: int  # the autoencoder's activations

    @property
    def peak(self) -> int:
        return self.resident + max(self.planning, self.step, self.text, self.decode)


@dataclass(frozen=True)
class Networks:
    """A pipeline's networks, of which only shapes are used; ``dtype`` is the dtype that they will have.

    FLUX.2 has a language model in place of CLIP and T5.
    """

    flux: Flux
    ae: AutoEncoder
    clip: CLIPTextEncoder | None = None
    t5: T5Encoder | None = None
    dtype: torch.dtype = torch.bfloat16
    language_model: nn.Module | None = None

    def encoders(self) -> list[nn.Module]:
        """The text encoders."""
        return [network for network in (self.clip, self.t5, self.language_model) if network is not None]

    @classmethod
    def official(cls, config: FluxConfig | None = None) -> Networks:
        with meta_init():
            return cls(Flux(config or FluxConfig()), AutoEncoder(), CLIPTextEncoder(), T5Encoder())

    @checked(PlacementError)
    def need(self, placement: Placement, height: int, width: int, txt_len: int) -> Need:
        """The need of one image of ``height x width`` pixels with ``txt_len`` text tokens."""
        for name, value, low in (("height", height, 16), ("width", width, 16), ("txt_len", txt_len, 0)):
            check_integer(name, value, low, 1 << 14, error=PlacementError)
        itemsize = self.dtype.itemsize
        resident = sum(placement.resident_bytes(n, itemsize) for n in (self.flux, self.ae, *self.encoders()))
        dequantised = placement.dequantised_bytes(self.flux, itemsize)
        step, decode = activations(
            self.flux.config, self.ae.config, height, width, txt_len, self.dtype, placement.tiled
        )
        plan = itemsize * STEPS * sum(linear.out_features for linear in modulations(self.flux))
        planning, blocks = self._streaming(placement, self.flux) or (0, 0)
        text = max([0, *(size for encoder in self.encoders() for size in self._streaming(placement, encoder))])
        return Need(resident, planning + plan, blocks + plan + step + dequantised, text, decode)

    def _streaming(self, placement: Placement, network: nn.Module) -> list[int]:
        """For each list of streamed modules, the most bytes that two consecutive ones have together."""
        groups = placement.streamed_modules(network)
        streamed = {module for group in groups for module in group}
        largest = []
        for group in groups:
            sizes = [self.dtype.itemsize * sum(p.numel() for p in own_parameters(m, streamed)) for m in group]
            largest.append(max((a + b for a, b in pairwise([*sizes, 0])), default=0))
        return largest


@lru_cache(maxsize=64)
def activations(
    flux: TransformerConfig, ae: PyramidConfig, height: int, width: int, txt_len: int, dtype: torch.dtype, tiled: bool
) -> tuple[int, int]:
    """The most bytes of tensors alive at once in a step of the flow and in decoding, counted on the meta device.

    One block of each kind is enough: the others run after it and need no more.
    """
    with meta_init(), torch.no_grad(), _NoAttentionMap():
        short = flux.with_(depth=min(flux.depth, 1), depth_single_blocks=min(flux.depth_single_blocks, 1))
        decoder, network = MODELS[type(ae)](ae).to(dtype), MODELS[type(flux)](short).to(dtype)
        rows, columns = height // ae.downscale, width // ae.downscale
        img_len = rows * columns // 4
        plan = network.plan(torch.empty(1), torch.empty(1), torch.empty(1, flux.vec_in_dim))
        rope = torch.empty(1, txt_len + img_len, flux.head_dim // 2, dtype=torch.complex64)
        img = torch.empty(1, img_len, flux.in_channels, dtype=dtype)
        txt = torch.empty(1, txt_len, flux.context_in_dim, dtype=dtype)
        with PeakBytes() as step:
            network.velocity(img, txt, rope, plan)
        sides = (min(rows, TILE), min(columns, TILE)) if tiled else (rows, columns)
        latent = torch.empty(1, ae.z_channels, *sides, dtype=dtype)
        with PeakBytes() as decode:
            decoder.decode(latent)
    return step.peak, decode.peak


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside and alive at once, as torch.cuda.max_memory_allocated does."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known | inputs:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


class _NoAttentionMap(TorchFunctionMode):
    """On the meta device, attention would allocate its whole map; the fused kernel of a GPU does not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


@checked(PlacementError, "networks", "mode", "free", "size", "txt_len")
def choose(
    networks: Networks, mode: str, free: float, size: int = 1024, txt_len: int = 512, quantised: str | None = None
) -> Placement:
    """The placement for ``mode``; for auto, the one that streams least among those that need at most ``free`` bytes.

    Quantised blocks are not streamed, so with them the smallest placement is no-modulations.
    """
    check_choice("memory", mode, MODES, error=PlacementError)
    check_format(quantised)
    blocks = len(_blocks(networks.flux))

    def fits(placement: Placement) -> bool:
        return networks.need(placement, size, size, txt_len).peak <= free

    if quantised is not None:
        if mode == "stream":
            raise PlacementError('streamed blocks cannot be quantised; load with memory="no-modulations".')
        modes = ("full", "no-modulations") if mode == "auto" else (mode,)
        options = [Placement(mode, tiled=tiled, quantised=quantised) for tiled in (False, True) for mode in modes]
        return next(filter(fits, options), options[-1]) if mode == "auto" else options[0]
    if mode != "auto":
        return Placement(mode, blocks if mode == "stream" else 0)
    for placement in (Placement(), Placement("no-modulations")):
        if fits(placement):
            return placement
    tiled = not fits(Placement("stream", blocks))
    too_few = bisect_left(range(1, blocks), True, key=lambda count: fits(Placement("stream", count, tiled)))
    return Placement("stream", too_few + 1, tiled)


def free_bytes(device: torch.device) -> float:
    """The memory of a device that may be used; infinite on the CPU, where mapped weights take none of their own."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allowed = total * torch.cuda.get_per_process_memory_fraction(device) - torch.cuda.memory_reserved(device)
        return min(free, allowed) - RESERVE
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) - RESERVE
    return float("inf")


def summary(placement: Placement, need: Need, free: float, device: torch.device) -> str:
    """One line: what was chosen, and what it is predicted to need."""
    blocks = f"{placement.streamed} of the flow's blocks, " if placement.streamed else ""
    text = f"{blocks}the modulation layers and the text encoders are streamed to it when they are needed"
    text = "all weights stay on it" if placement.mode == "full" else text
    text += f"; the blocks' weights are {placement.quantised}" if placement.quantised else ""
    text += "; images are decoded in tiles" if placement.tiled else ""
    room = "" if free == float("inf") else f" of {free / GB:.1f} GB free"
    return (
        f"memory={placement.mode!r} on {device}: {text}; "
        f"about {need.peak / GB:.1f} GB{room} for an image of 1024 x 1024 (predicted)."
    )


@checked(PlacementError)
def predicted(
    cards: tuple[int, ...] = CARDS, networks: Networks | None = None, size: int = 1024, quantised: str | None = None
) -> list[dict]:
    """One row per size of card, in GB: what auto chooses there, what stays on the card, and the peak of each stage."""
    networks, rows = networks or Networks.official(), []
    for card in cards:
        free = card * GB - RESERVE
        placement = choose(networks, "auto", free, size, quantised=quantised)
        need = networks.need(placement, size, size, 512)
        row = {"card": f"{card} GB", **asdict(placement), "resident": need.resident / GB}
        for stage in ("text", "planning", "step", "decode"):
            row[stage] = (need.resident + getattr(need, stage)) / GB
        rows.append({**row, "peak": need.peak / GB, "fits": need.peak <= free})
    return rows


def table(size: int = 1024) -> str:
    """The prediction as text."""
    columns = {"card": 5, "mode": 14, "streamed": 8, "tiled": 5, "resident": 8}
    columns |= {"text": 6, "planning": 8, "step": 6, "decode": 6, "peak": 6, "fits": 5}
    lines = [
        f"predicted, not measured: FLUX.1 dev in bfloat16, one image of {size} x {size}, 512 text tokens, in GB;",
        f"{RESERVE / GB:g} GB of each card is left to CUDA itself; streamed: how many of the 57 blocks",
        "  ".join(f"{name:>{width}}" for name, width in columns.items()),
    ]
    for row in predicted(size=size):
        cells = [f"{row[name]:.1f}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(cells, columns.values(), strict=True)))
    return "\n".join(lines)


# ---------------------------------------------------------------- when memory runs out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what PyTorch raises when memory runs out, on a GPU or on the CPU."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError)
        and any(words in text for words in ("out of memory", "not enough memory", "alloc_cpu"))
    )


@contextmanager
def memory_advice(
    networks: Networks, device: torch.device, height: int, width: int, txt_len: int, quantised: str | None = None
) -> Iterator[None]:
    """Turn an allocator's error into OutOfMemory, with the needs of an image of ``height x width`` in each mode."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the tensors that filled the memory
        try:
            message = advice(networks, device, height, width, txt_len, quantised)
        except Exception:  # counting needs some memory too
            message = (
                f"memory ran out on {device}: choose a size below {height} x {width}, or load with another memory=."
            )
        raise OutOfMemory(message) from None


def advice(
    networks: Networks, device: torch.device, height: int, width: int, txt_len: int, quantised: str | None = None
) -> str:
    """What each memory mode needs, what is free, and what needs less. Reads only the networks' configurations."""
    if quantised is None and networks.flux.placement is not None:
        quantised = networks.flux.placement.quantised
    with meta_init():  # built anew, because blocks may have been swapped
        flux, ae, language_model = networks.flux.config, networks.ae.config, networks.language_model
        networks = Networks(
            MODELS[type(flux)](flux),
            MODELS[type(ae)](ae),
            None if networks.clip is None else CLIPTextEncoder(networks.clip.config),
            None if networks.t5 is None else T5Encoder(networks.t5.config),
            networks.dtype,
            None if language_model is None else type(language_model)(language_model.config),
        )

    def gigabytes(mode: str, height: int, width: int) -> str:
        streamed = len(_blocks(networks.flux)) if mode == "stream" else 0
        placement = Placement(mode, streamed, quantised=quantised)
        return f"{networks.need(placement, height, width, txt_len).peak / GB:.2f} GB"

    modes = MODES[1:3] if quantised else MODES[1:]  # quantised blocks are not streamed
    needs = ", ".join(f"about {gigabytes(mode, height, width)} with memory={mode!r}" for mode in modes)
    free = free_bytes(device)
    room = "" if free == float("inf") else f"; {max(free, 0) / GB:.2f} GB are free"
    weights = f" and {quantised} weights" if quantised else ""
    half_height, half_width = max(16, height // 32 * 16), max(16, width // 32 * 16)
    half = f"{half_height} x {half_width} needs about {gigabytes('full', half_height, half_width)} with memory='full'"
    fewer_bits = "" if quantised else "use quantise= (fewer bits, not exact), "
    return (
        f"memory ran out on {device}: an image of {height} x {width}{weights} needs {needs}{room}; {half}. "
        f"Load with a memory= further to the right, {fewer_bits}or choose a smaller image."
    )
