"""The models that ship with the package: which files each consists of, and how it is sampled. Without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fluxedu.models.config import Sampling

WEIGHTS = Path(__file__).parent / "weights"
#: mu of the miniature, ln 3 at any size; like the guidance scales, chosen on prompts that are not in the exam
NANO_SHIFT = (1.0986, 1.0986)


class ShippedModel(NamedTuple):
    """A model in ``WEIGHTS``: folder of its transformer, sampling settings, folder of its Redux head or its LoRA."""

    transformer: str
    sampling: Sampling
    head: str | None = None
    lora: str | None = None

    def folder(self, weights: Path) -> Path:
        """The folder that only this model has."""
        return Path(weights) / (self.head or self.lora or self.transformer)


def _as_dev(guidance: float) -> Sampling:
    return Sampling(20, guidance, 32, shift=True, shift_ends=NANO_SHIFT)


SHIPPED = {
    "nano": ShippedModel("transformer", _as_dev(6.0)),
    "nano-base": ShippedModel("transformer_base", _as_dev(5.0)),
}
#: the rest of the family; ``fluxedu train --variant NAME`` makes them
FAMILY = {
    "nano-schnell": ShippedModel("transformer_schnell", Sampling(4, 0.0, 32, shift=False)),
    "nano-fill": ShippedModel("transformer_fill", _as_dev(1.0)),
    "nano-canny": ShippedModel("transformer", _as_dev(1.0), lora="lora_canny"),
    "nano-depth": ShippedModel("transformer", _as_dev(1.0), lora="lora_depth"),
    "nano-kontext": ShippedModel("transformer_kontext", _as_dev(1.0)),
    "nano-redux": ShippedModel("transformer", _as_dev(3.0), head="redux"),
}
#: FLUX.2 in miniature; ``fluxedu train --variant flux2`` makes it
SHIPPED_FLUX2 = {"nano-flux2": ShippedModel("transformer_flux2", _as_dev(5.0))}
SHIPPED_MODELS = SHIPPED | FAMILY | SHIPPED_FLUX2
#: style LoRAs for ``nano`` by name, with their folders
LORAS = {"hollow": "lora_hollow"}
LORA_FILE = "pytorch_lora_weights.safetensors"
