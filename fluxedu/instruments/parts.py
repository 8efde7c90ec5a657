"""The parts of the architecture's diagram, in the order in which they run, and which sites belong to each."""

from __future__ import annotations

from dataclasses import dataclass

from fluxedu.instruments.lenses.run import blocks_of
from fluxedu.sampling.pipeline import FluxPipeline


@dataclass(frozen=True)
class Part:
    """One box of the diagram. ``kind``: text, time, flow or image · ``begins``: how its sites' names begin."""

    name: str
    title: str
    kind: str
    text: str
    begins: tuple[str, ...]

    def has(self, site: str) -> bool:
        return site.startswith(self.begins)


_BEFORE = (
    Part("clip", "CLIP text encoder", "text", "One vector for the whole prompt: all that modulation hears of it.",
         ("clip.",)),
    Part("t5", "T5 encoder", "text", "A vector for every piece of the prompt: what the image tokens look at.",
         ("t5.",)),
    Part("encoder", "Autoencoder: a picture in", "image",
         "Pixels become a latent; only where a run begins with a picture.", ("ae.encoder.", "ae.latent")),
    Part("noise", "Noise", "image",
         "Where the run begins: a number a channel and cell, drawn on the CPU from the seed.",
         ("sample.noise",)),
    Part("vec", "Time + guidance + text", "time",
         "Three vectors are added, and every shift, scale and gate of every block is made from the sum. They do not "
         "depend on the picture, so those of all steps are known before the first.", ("vec", "sample.pooled")),
    Part("in", "Patches and words", "flow", "Both kinds of token are brought to the transformer's width.",
         ("img_in", "txt_in", "sample.txt")),
)  # fmt: skip
_AFTER = (
    Part("final", "Last layer: velocity", "flow",
         "Image tokens become velocities, noise minus picture, a patch each.", ("final_layer.", "velocity")),
    Part("solver", "Solver", "time", "From noise (t = 1) to the picture (t = 0), against the velocity, step by step.",
         ("sample.x", "sample.velocity", "sample.negative", "sample.prompted", "sample.latent")),
    Part("image", "Autoencoder: the picture", "image", "The latent becomes pixels.", ("ae.decoder.", "sample.image")),
)  # fmt: skip
_BLOCK = {
    "double": "Text and image have weights of their own; one attention mixes them.",
    "single": "Text and image are one sequence; attention and MLP work side by side on the same tokens.",
}


def parts(pipe: FluxPipeline) -> list[Part]:
    """Every part of a pipeline; each of its sites belongs to exactly one."""
    blocks = []
    for name in blocks_of(pipe):
        kind, number = name.split(".")
        blocks.append(Part(name, f"{kind.capitalize()}-stream block {number}", "flow", _BLOCK[kind], (f"{name}.",)))
    return [*_BEFORE, *blocks, *_AFTER]
