"""Checkpoints: reading, writing, converting and merging weights. Strict, and safetensors only.

fe.checkpoints.convert(state_dict, to="diffusers")          names and rows, exactly, in both directions
fe.checkpoints.load_model("flux1-dev.safetensors")          the network with these weights
fe.checkpoints.convert_file("flux1-dev.safetensors", "transformer", to="diffusers")
fe.checkpoints.merge(flux, fe.checkpoints.read("lora.safetensors"), scale=0.85).unmerge()
"""

from fluxedu.checkpoints.configs import from_diffusers_config, infer_config, to_diffusers_config
from fluxedu.checkpoints.layouts import convert, convert_lazily, shapes
from fluxedu.checkpoints.lora import Merged, extract, merge, widen_input
from fluxedu.checkpoints.lora_files import lora_in_channels
from fluxedu.checkpoints.official import OFFICIAL, OFFICIAL_FLUX2, Official, find, find_flux2, flux2_error
from fluxedu.checkpoints.reading import config_of, load_into, load_model, open_model, read
from fluxedu.checkpoints.writing import convert_file, save_file, save_folder
from fluxedu.errors import CheckpointError

__all__ = [
    "OFFICIAL",
    "OFFICIAL_FLUX2",
    "CheckpointError",
    "Merged",
    "Official",
    "config_of",
    "convert",
    "convert_file",
    "convert_lazily",
    "extract",
    "find",
    "find_flux2",
    "flux2_error",
    "from_diffusers_config",
    "infer_config",
    "load_into",
    "load_model",
    "lora_in_channels",
    "merge",
    "open_model",
    "read",
    "save_file",
    "save_folder",
    "shapes",
    "to_diffusers_config",
    "widen_input",
]
