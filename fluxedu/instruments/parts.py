"""The parts of the architecture diagram, in the order in which they run, and the sites that belong to each."""

from __future__ import annotations

from dataclasses import dataclass

from fluxedu.instruments.lenses.run import blocks_of
from fluxedu.models.flux2 import Flux2
from fluxedu.sampling.pipeline import FluxPipeline


@dataclass(frozen=True)
class Part:
    """One box of the diagram. ``kind``: text, time, flow or image · ``prefixes``: of the names of its sites."""

    name: str
    title: str
    kind: str
    text: str
    prefixes: tuple[str, ...]

    def has(self, site: str) -> bool:
        return site.startswith(self.prefixes)


def parts(pipe: FluxPipeline) -> list[Part]:
    """All parts of a pipeline; each of its sites belongs to exactly one."""
    found, networks = [], pipe.networks()
    if "clip" in networks:
        text = "One vector for the whole prompt, which the modulation of every block depends on."
        found.append(Part("clip", "CLIP text encoder", "text", text, ("clip.",)))
    text = "One vector per token of the prompt. The image tokens attend to these."
    if "t5" in networks:
        found.append(Part("t5", "T5 encoder", "text", text, ("t5.",)))
    if "language_model" in networks:
        text = f"{text} Each is three hidden states of a language model, side by side. The language model has no sites."
        found.append(Part("language_model", "Language model", "text", text, ()))
    text = "Encodes an image as a latent; used only if a run starts from an image."
    found.append(Part("encoder", "Autoencoder: image to latent", "image", text, ("ae.encoder.", "ae.latent")))
    text = "The initial state of the run: one random number per channel and cell, drawn on the CPU from the seed."
    found.append(Part("noise", "Noise", "image", text, ("sample.noise",)))
    terms = ["Time"] + ["guidance"] * pipe.flux.config.guidance_embed + ["text"] * (pipe.flux.config.vec_in_dim > 0)
    vectors = {1: "The time as a vector", 2: "The sum of two vectors", 3: "The sum of three vectors"}[len(terms)]
    text = (
        f"{vectors}, from which every shift, scale and gate of every block is computed"
        f"{', by three layers that all blocks share' if isinstance(pipe.flux, Flux2) else ''}. They do not "
        "depend on the image, so those of all steps are computed before the first step."
    )
    found.append(Part("vec", " + ".join(terms), "time", text, ("vec", "sample.pooled")))
    text = "Two linear layers bring image and text tokens to the transformer's width."
    found.append(Part("in", "Image and text input", "flow", text, ("img_in", "txt_in", "sample.txt")))

    block_texts = {
        "double": "Text and image have their own weights and share one attention.",
        "single": "Text and image are one sequence; attention and MLP are computed side by side from the same tokens.",
    }
    for name in blocks_of(pipe):
        kind, number = name.split(".")
        text = block_texts[kind]
        found.append(Part(name, f"{kind.capitalize()}-stream block {number}", "flow", text, (f"{name}.",)))

    text = "Maps each image token to its patch of the velocity, which is noise minus image."
    found.append(Part("final", "Last layer: velocity", "flow", text, ("final_layer.", "velocity")))
    text = "Moves from noise (t = 1) to the image (t = 0), against the velocity, step by step."
    sites = ("sample.x", "sample.velocity", "sample.negative", "sample.prompted", "sample.latent")
    found.append(Part("solver", "Solver", "time", text, sites))
    text = "Decodes the latent to pixels."
    found.append(Part("image", "Autoencoder: latent to image", "image", text, ("ae.decoder.", "sample.image")))
    return found
