"""Files of training: states of runs and data that other networks made, checked before they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn, uint8

from fluxedu.errors import CheckpointError


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; raises CheckpointError for a damaged file or one that is no file."""
    try:
        if not path.is_file():
            raise FileNotFoundError
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, load_file(path)
    except (SafetensorError, OSError):
        raise CheckpointError(f"{path} is missing, damaged or not a file.") from None


def is_made_from(path: Path, made_from: str, keys: Collection[str]) -> bool:
    """Whether a file of training data is in order, has these tensors and was made from the same networks."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a file; delete it.")
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("made_from") == made_from and set(file.keys()) == set(keys)
    except (SafetensorError, OSError):
        return False


def fingerprint(*networks: nn.Module) -> str:
    """A hash of configurations and weights: it shows whether data were made with these networks."""
    digest = hashlib.sha256()
    for network in networks:
        digest.update(repr(network.config).encode())
        for name, value in network.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().reshape(-1).view(uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
