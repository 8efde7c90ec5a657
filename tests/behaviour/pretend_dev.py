"""A simulated FLUX.1-dev: the official repository in a Hugging Face cache, with small widths and random values.

    put_in(cache)     # then, with HF_HUB_CACHE=cache, fe.load("dev") opens it in bfloat16
    make_quick()      # in the process that loads it: defaults of 192 x 192 pixels, 20 steps and 128 text tokens

It has what the miniature lacks: bfloat16, heads of 128 with axes (16, 56, 56), 77 CLIP tokens, more T5 tokens, and a
shift that grows with the image's size. Its widths, depths and images also differ from what a notebook may assume.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import nn

from fluxedu.checkpoints import OFFICIAL, save_folder
from fluxedu.models import VARIANTS, AutoEncoder, AutoEncoderConfig, CLIPTextEncoder, Flux, FluxConfig, T5Encoder
from fluxedu.nano import networks
from fluxedu.nano.tokenizers import save_tokenizers
from fluxedu.sampling.pipeline import FluxPipeline

CLIP = networks.CLIP.with_(
    hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=77
)
T5 = networks.T5.with_(d_model=48, d_kv=8, d_ff=96, num_layers=5, num_heads=6)
FLUX = FluxConfig.variant("dev").with_(
    hidden_size=256, num_heads=2, depth=3, depth_single_blocks=5, vec_in_dim=64, context_in_dim=48
)
AE = AutoEncoderConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)
SIZE, STEPS, TEXT = 192, 20, 128


def put_in(cache: Path) -> None:
    """Create the repository in ``cache``, an empty folder."""
    home = cache / f"models--{OFFICIAL['dev'].id.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flux, ae, clip, t5 = map(_made, (Flux(FLUX), AutoEncoder(AE), CLIPTextEncoder(CLIP), T5Encoder(T5)))
    save_file(flux, snapshot / OFFICIAL["dev"].single)
    save_file(ae, snapshot / "ae.safetensors")
    save_folder(clip, snapshot / "text_encoder", CLIP)
    save_folder(t5, snapshot / "text_encoder_2", T5)
    save_tokenizers(snapshot)


@torch.no_grad()
def _made(network: nn.Module) -> dict:
    """The network's values in bfloat16, large enough to have an effect through all layers."""
    for p in network.parameters():
        if p.ndim > 1:
            p *= 3**0.5  # torch's own scale keeps a third of the variance
    return network.bfloat16().state_dict()


def make_quick() -> None:
    """For the rest of this process, use defaults with which a CPU draws an image in two seconds."""
    dev = VARIANTS["dev"]
    VARIANTS["dev"] = replace(dev, sampling=replace(dev.sampling, steps=STEPS, text_length=TEXT))
    begin = FluxPipeline.__init__

    def small(self, *args):
        begin(self, *args)
        self.size = min(self.size, SIZE)

    patch.object(FluxPipeline, "__init__", small).start()
