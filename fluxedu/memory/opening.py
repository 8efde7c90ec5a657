"""The four networks from their files, each weight to where its placement wants it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fluxedu.checkpoints import load_into, outline
from fluxedu.errors import describe
from fluxedu.memory import quantised
from fluxedu.memory.placement import Networks, Placement, choose, free_bytes
from fluxedu.memory.shortage import advised
from fluxedu.memory.tiles import decode_tiled
from fluxedu.memory.visits import Visits

#: the parts of a folder, by our names
FOLDERS = {"flux": "transformer", "ae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}


def open_networks(
    parts: dict[str, Path],
    device: torch.device,
    dtype: torch.dtype,
    memory: str = "auto",
    quantise: str | None = None,
    words: int = 512,
) -> dict[str, nn.Module]:
    """``flux``, ``ae``, ``clip`` and ``t5`` of ``parts`` (folder or file by the official folders' names).

    ``quantise`` makes the flow's blocks small (quantised.py). What was chosen for ``memory="auto"`` is said in one line
    on stderr, unless everything stays.
    """
    if quantise is not None:
        quantised.check(quantise)
    outlines = {name: outline(parts[folder]) for name, folder in FOLDERS.items()}
    networks = {name: network for name, (network, _) in outlines.items()}
    hollow_ones = Networks(**networks, dtype=dtype)
    free = free_bytes(device)
    everything_fits = memory == "auto" and free == float("inf")
    placement = Placement(small=quantise) if everything_fits else choose(hollow_ones, memory, free, small=quantise)
    if memory == "auto" and device.type != "cpu":
        need = hollow_ones.need(placement, 1024, 1024, words)
        print(describe(placement, need, free, device), file=sys.stderr)
    with advised(hollow_ones, device, 1024, 1024, words, quantise):
        for network, tensors in outlines.values():
            _fill(network, tensors, placement, device, dtype)
    if placement.tiled:
        networks["ae"].decode = partial(decode_tiled, networks["ae"])
    return networks


def _fill(network: nn.Module, tensors, placement: Placement, device: torch.device, dtype: torch.dtype) -> None:
    """The weights to where they belong; then the visitors are told to visit."""
    groups, small = placement.visitors(network), {f"{name}.weight" for name in placement.made_small(network)}
    stays_home = placement.away(network) | small
    load_into(network, tensors, dtype, lambda name: "cpu" if name in stays_home else device)
    network.requires_grad_(False)
    network.visitors = tuple(module for group in groups for module in group)
    if small:
        quantised.quantise(network, placement.small, device)
    for group in groups:
        Visits(group, device, apart=network.visitors)
