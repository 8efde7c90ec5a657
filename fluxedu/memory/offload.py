"""Loading the networks with little memory: weights stay on the host and are streamed to the device when needed.

    networks = open_networks(parts, device, dtype, memory="auto")  # each on the device that its placement assigns
    WeightStreamer(flux.single_blocks, device="cuda")              # only two of 38 blocks are there at a time

While a module computes, a thread copies the weights of the next one, on CUDA in a stream of its own. Nothing is
computed differently, so results are equal to the bit. On the CPU the copies are made and freed all the same, so that
tests run the very same lines.

This is for inference: autograd and ``fe.swap`` would not find streamed weights where they look for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxedu.checkpoints import load_into, open_model
from fluxedu.errors import PlacementError, check_device, check_integer, check_tensor, checked
from fluxedu.memory.placement import (
    TILE,
    Networks,
    Placement,
    choose,
    free_bytes,
    memory_advice,
    own_parameters,
    summary,
)
from fluxedu.memory.quantised import check_installed, quantise
from fluxedu.models import AutoEncoder, Flux, Flux2AutoEncoder
from fluxedu.models.meta_init import meta_init

#: our name of each network -> its folder on the hub
FOLDERS = {"flux": "transformer", "ae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
OVERLAP = 16  # latent cells that neighbouring tiles share
_copy_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fluxedu-weights")


# ---------------------------------------------------------------- opening


@checked(PlacementError, "parts", "device", "dtype", "memory", "txt_len", "change")
def open_networks(
    parts: dict[str, Path],
    device: torch.device,
    dtype: torch.dtype,
    memory: str = "auto",
    quantised: str | None = None,
    txt_len: int = 512,
    change: Callable[[dict], dict] = dict,
    language_model: nn.Module | None = None,
) -> dict[str, nn.Module]:
    """Those of ``flux``, ``ae``, ``clip`` and ``t5`` that ``parts`` names (hub folder name -> folder or file).

    For FLUX.2, ``language_model`` is added, which is on the CPU and moved, or streamed, from there.

    ``quantised``: a format for the weights of the transformer's blocks (see quantised.py). ``change`` receives, by
    name, every network without its weights and the tensors to load, and returns what is loaded instead. With
    ``memory="auto"`` on a GPU, one line on stderr says what was chosen.
    """
    if quantised is not None:
        check_installed(quantised)
    folders = {name: folder for name, folder in FOLDERS.items() if folder in parts}
    opened = change({name: open_model(parts[folder], part=folder) for name, folder in folders.items()})
    modules = {name: module for name, (module, _) in opened.items()}
    networks = Networks(**modules, dtype=dtype, language_model=language_model)
    free = free_bytes(device)
    if memory == "auto" and free == float("inf"):
        placement = Placement(quantised=quantised)
    else:
        placement = choose(networks, memory, free, quantised=quantised)
    if memory == "auto" and device.type != "cpu":
        need = networks.need(placement, 1024, 1024, txt_len)
        print(summary(placement, need, free, device), file=sys.stderr)
    if placement.tiled:
        with meta_init():
            tiled = TiledFlux2AutoEncoder if isinstance(modules["ae"], Flux2AutoEncoder) else TiledAutoEncoder
            modules["ae"] = tiled(modules["ae"].config).eval()
    with memory_advice(networks, device, 1024, 1024, txt_len, quantised):
        for name, module in modules.items():
            _load(module, opened[name][1], placement, device, dtype)
        if language_model is not None:
            _place(language_model, placement, device)
    return modules if language_model is None else modules | {"language_model": language_model}


def _place(network: nn.Module, placement: Placement, device: torch.device) -> None:
    """Move a network to the device, except the modules that are streamed to it."""
    groups = placement.streamed_modules(network)
    streamed = {id(p) for group in groups for module in group for p in module.parameters()}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data if id(parameter) in streamed else parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for group in groups:
        WeightStreamer(group, device)


def _load(
    network: nn.Module, tensors: Mapping[str, Tensor], placement: Placement, device: torch.device, dtype: torch.dtype
) -> None:
    """Load each weight on the device that its placement assigns, quantise, and set up streaming."""
    groups = placement.streamed_modules(network)
    to_quantise = {f"{name}.weight" for name in placement.quantised_layers(network)}
    on_host = placement.streamed_names(network) | to_quantise  # blocks move to the device one by one, to be quantised
    load_into(network, tensors, dtype, lambda name: "cpu" if name in on_host else device)
    network.requires_grad_(False)
    if isinstance(network, Flux) and placement != Placement():
        network.placement = Placement(placement.mode, placement.streamed, placement.tiled)
        if placement.quantised:
            quantise(network, placement.quantised, device)
    for group in groups:
        WeightStreamer(group, device, others=[module for group in groups for module in group])


# ---------------------------------------------------------------- streaming


@dataclass
class _Copies:
    """Copies of some weights on the device, and what they were copied from."""

    tensors: list[Tensor]
    versions: list[tuple[int, int]]  # the address of each weight, and its version counter
    done: torch.cuda.Event | None


class WeightStreamer:
    """Streams the weights of ``modules``, which run in this order, to ``device``, each while it is called.

    A module's weights are those of all modules below it, except ``others``, which are streamed on their own. The
    weights of the next module are copied while one computes.
    """

    @checked(PlacementError)
    def __init__(self, modules: Sequence[nn.Module], device: torch.device | str, others: Sequence[nn.Module] = ()):
        self.device = check_device(device, PlacementError)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.modules, self.others = list(modules), set(others)
        self.pending: dict[int, Future] = {}  # copies that are being made
        self.on_host: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}  # the weights of the modules that are running
        for i, module in enumerate(self.modules):
            module.register_forward_pre_hook(lambda _, args, i=i: self._enter(i, args))
            module.register_forward_hook(lambda *_, i=i: self._leave(i), always_call=True)

    def _enter(self, i: int, args: tuple) -> tuple:
        """Replace the weights by their device copies, and start copying the next module's."""
        weights = self._weights(i)
        pending = self.pending.pop(i, None)
        copies = pending.result() if pending else None
        if copies is None or copies.versions != _versions(weights):  # not copied yet, or changed since
            copies = self._copy(weights)
        if i + 1 < len(self.modules) and i + 1 not in self.pending:
            self.pending[i + 1] = _copy_thread.submit(self._copy, self._weights(i + 1))
        if copies.done is not None:
            torch.cuda.current_stream(self.device).wait_event(copies.done)
        self.on_host[i] = [(weight, weight.data) for weight in weights]
        for weight, copy in zip(weights, copies.tensors, strict=True):
            weight.data = copy
            if copy.is_cuda:  # its memory must not be reused before this stream has finished with it
                copy.record_stream(torch.cuda.current_stream(self.device))
        return tuple(a.to(self.device) if isinstance(a, Tensor) else a for a in args)

    def _leave(self, i: int) -> None:
        for weight, tensor in self.on_host.pop(i, ()):
            weight.data = tensor

    def _weights(self, i: int) -> list[nn.Parameter]:
        return list(own_parameters(self.modules[i], self.others))

    def _copy(self, weights: list[nn.Parameter]) -> _Copies:
        versions = _versions(weights)  # before copying, so that a change made meanwhile is noticed
        with torch.cuda.stream(self.stream), torch.no_grad():  # None is the current stream
            tensors = [weight.data.to(self.device, copy=True, non_blocking=True) for weight in weights]
        return _Copies(tensors, versions, self.stream.record_event() if self.stream else None)


def _versions(weights: list[nn.Parameter]) -> list[tuple[int, int]]:
    return [(weight.data_ptr(), weight._version) for weight in weights]


# ---------------------------------------------------------------- decoding in tiles


class TiledAutoEncoder(AutoEncoder):
    """An autoencoder that decodes in tiles, so that its activations do not grow with the image.

    Tiles overlap and are blended linearly. This is not exact: the attention and the group norms see a tile and not the
    whole image. Compared with decoding the miniature's images of 24 x 24 cells at once, tiles of 16 cells reach 47 to
    51 dB for seven of eight seeds, and 32 dB for one, where a tile was all background.
    """

    def decode(self, latent: Tensor) -> Tensor:
        return decode_tiled(self, latent)


class TiledFlux2AutoEncoder(Flux2AutoEncoder):
    """The same for FLUX.2's autoencoder."""

    def decode(self, latent: Tensor) -> Tensor:
        return decode_tiled(self, latent)


@checked(PlacementError)
def decode_tiled(ae: AutoEncoder, latent: Tensor, tile: int = TILE, overlap: int = OVERLAP) -> Tensor:
    """Like ``ae.decode``: latent ``[B, z, h, w]`` -> image ``[B, 3, 8h, 8w]``, ``tile x tile`` cells at a time."""
    check_integer("overlap", overlap, 1, tile - 1, "tiles are larger than what they share", PlacementError)
    batch, channels, rows, columns = check_tensor("latent", latent, "[B, z, h, w]", PlacementError).shape
    if channels != ae.config.z_channels:
        raise PlacementError(f"latent must have {ae.config.z_channels} channels, not {channels}.")
    scale, height, width = ae.config.downscale, min(tile, rows), min(tile, columns)
    image = torch.zeros(
        batch, ae.config.out_ch, scale * rows, scale * columns, dtype=torch.float32, device=latent.device
    )
    total = torch.zeros(scale * rows, scale * columns, dtype=torch.float32, device=latent.device)
    z = ae.denormalise(latent)
    for top in tile_starts(rows, height, overlap):
        for left in tile_starts(columns, width, overlap):
            part = ae.decoder(z[:, :, top : top + height, left : left + width])
            vertical = _blend_weights(scale * top, scale * height, scale * rows, scale * overlap)
            horizontal = _blend_weights(scale * left, scale * width, scale * columns, scale * overlap)
            weight = torch.outer(vertical, horizontal).to(latent.device)  # [scale * height, scale * width]
            area = slice(scale * top, scale * (top + height)), slice(scale * left, scale * (left + width))
            image[(..., *area)] += weight * part.float()
            total[area] += weight
    return (image / total).to(latent.dtype)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover ``length`` cells and share at least ``overlap``."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def _blend_weights(start: int, tile: int, length: int, overlap: int) -> Tensor:
    """A tile's weights along one side: linear over ``overlap`` pixels, except at the edges of the image."""
    pixel = torch.arange(tile, dtype=torch.float32, device="cpu") + 0.5
    weight = torch.ones(tile, dtype=torch.float32, device="cpu")
    if start > 0:
        weight = weight * (pixel / overlap).clamp(max=1)
    if start + tile < length:
        weight = weight * ((tile - pixel) / overlap).clamp(max=1)
    return weight
