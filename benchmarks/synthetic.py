"""A checkpoint of the true names and shapes with random values, to measure speed and memory.

    python -m benchmarks.synthetic dev /big/disk/dev          # 33.7 GB; any variant
    python -m benchmarks.synthetic dev /tmp/dev --small       # the same layout, a few MB

The folder has the layout of the hub and opens with ``fe.load("/big/disk/dev")``. The official tokenizers may not be
copied, so it has the miniature's, with their end-of-text token for CLIP. One tensor is in memory at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from fluxedu.checkpoints import save_folder
from fluxedu.files import atomic_path
from fluxedu.models import (
    AutoEncoder,
    AutoEncoderConfig,
    CLIPTextConfig,
    CLIPTextEncoder,
    Flux,
    FluxConfig,
    T5Config,
    T5Encoder,
)
from fluxedu.models.meta_init import meta_init
from fluxedu.nano import networks
from fluxedu.nano.tokenizers import save_tokenizers
from fluxedu.terminal import report_errors

#: small widths, with the true 128 channels per head
SMALL = {
    Flux: {"hidden_size": 256, "num_heads": 2, "depth": 2, "depth_single_blocks": 3,
           "context_in_dim": 32, "vec_in_dim": 24},
    AutoEncoder: {"ch": 32, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1},
    CLIPTextEncoder: {"vocab_size": 741, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
                      "num_attention_heads": 2},
    T5Encoder: {"vocab_size": 192, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
KINDS = {
    "transformer": (Flux, FluxConfig),
    "vae": (AutoEncoder, AutoEncoderConfig),
    "text_encoder": (CLIPTextEncoder, CLIPTextConfig),
    "text_encoder_2": (T5Encoder, T5Config),
}


class RandomTensors(Mapping[str, Tensor]):
    """A network's state dict whose tensors are drawn on access, with the same values every time."""

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.bfloat16):
        self.shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        self.dtypes = dict.fromkeys(self.shapes, dtype)

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self.shapes[name], self.dtypes[name]
        fan = max(1, torch.Size(shape[1:]).numel())
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(shape, dtype=dtype).uniform_(-1, 1, generator=generator).mul_((3 / fan) ** 0.5)
        is_scale = len(shape) == 1 and not name.endswith("bias")
        if len(shape) == 1:
            values.mul_(0.1)
        return values.add_(1) if is_scale else values

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def synthetic(folder: str | Path, variant: str = "dev", small: bool = False) -> Path:
    """Write a folder with all networks of ``variant``, atomically. Raises ConfigError, CheckpointError."""
    with atomic_path(Path(folder), folder=True) as part:
        for name, (kind, config_of) in KINDS.items():
            config = FluxConfig.variant(variant) if kind is Flux else config_of()
            config = config.with_(**(SMALL[kind] if small else {}))
            if kind is CLIPTextEncoder:
                config = config.with_(eos_token_id=networks.CLIP.eos_token_id)
            with meta_init():
                network = kind(config)
            save_folder(RandomTensors(network), part / name, config)
        save_tokenizers(part)
    return Path(folder)


def main(
    variant: Annotated[str, typer.Argument(help="dev, schnell, fill, …")],
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    small: Annotated[bool, typer.Option("--small", help="Small widths, a few MB.")] = False,
) -> None:
    """Write a checkpoint of the true layout with random values."""
    with report_errors():
        synthetic(folder, variant, small)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    typer.echo(f"wrote {folder} ({size / 1e9:.2f} GB)")


if __name__ == "__main__":
    typer.run(main)
