"""Samples as training goes: a sheet of pictures and the judge's word on them, every so often."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from fluxedu.loading import NANO_SHIFT
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.clip import CLIPTextEncoder
from fluxedu.models.config import Sampling
from fluxedu.models.flux import Flux
from fluxedu.models.t5 import T5Encoder
from fluxedu.nano import networks
from fluxedu.nano.exam import sit
from fluxedu.nano.tokenizers import save_tokenizers
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.sampling.prompts import PromptEncoder, Tokenizer

PROMPTS = 42


def sheet(pictures: list[Image.Image], columns: int = 10, cell: int = 196) -> Image.Image:
    """Pictures side by side on grey."""
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * cell, rows * cell), (160, 160, 160))
    for i, picture in enumerate(pictures):
        page.paste(picture, ((i % columns) * cell + 2, (i // columns) * cell + 2))
    return page


def reporter(
    folder: Path, autoencoder: AutoEncoder, t5: T5Encoder, clip: CLIPTextEncoder, steps: int = 20
) -> Callable[[Flux, int], dict]:
    """``report(flux, step)``: draw held-out prompts with ``flux``, save the sheet, print the judge's rows."""
    folder = Path(folder)
    save_tokenizers(folder)
    encoder = PromptEncoder(
        Tokenizer(folder / "tokenizer", "<|endoftext|>", "<|endoftext|>", networks.TEXT_LENGTH, cut=True),
        clip,
        Tokenizer(folder / "tokenizer_2", "<pad>", "</s>", networks.TEXT_LENGTH, cut=False),
        t5,
    )

    def report(flux: Flux, step: int) -> dict:
        pipe = FluxPipeline(
            encoder, flux, autoencoder, Sampling(steps, 3.5, networks.TEXT_LENGTH, True, NANO_SHIFT), 128
        )
        drawn: list[Image.Image] = []

        def draw(prompts: list[str], seeds: list[int], size: tuple[int, int]) -> list[Image.Image]:
            pictures = pipe(prompts, seed=seeds, height=size[0], width=size[1], trajectory=False, progress=False).images
            drawn.extend(pictures)
            return pictures

        figures = sit(draw, PROMPTS, varied=0)
        sheet(drawn[:PROMPTS]).save(folder / f"samples-{step:06d}.png")
        rows = " · ".join(f"{k} {v['percent']:.0f}" for k, v in figures["rows"].items() if v["percent"] is not None)
        print(f"\nstep {step}: {rows} · quality {figures['quality']:.3f}", flush=True)
        return figures

    return report
