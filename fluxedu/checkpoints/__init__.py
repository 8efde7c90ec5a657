"""Checkpoints: read, write, rename, merge. Strict, and safetensors only.

fe.checkpoints.convert(state_dict, to="diffusers")          names and rows, exactly, both ways
fe.checkpoints.load_model("flux1-dev.safetensors")          the network with these weights
fe.checkpoints.convert_file("flux1-dev.safetensors", "transformer", to="diffusers")
fe.checkpoints.merge(flux, fe.checkpoints.read("lora.safetensors"), scale=0.85).unmerge()
"""

from fluxedu.checkpoints.configs import from_diffusers_config, to_diffusers_config
from fluxedu.checkpoints.layouts import convert, converted, infer_config
from fluxedu.checkpoints.load import config_of, load_into, load_model, outline, read
from fluxedu.checkpoints.lora import Merged, extract, inputs_of, merge, widen_input
from fluxedu.checkpoints.official import OFFICIAL, Official, find
from fluxedu.checkpoints.save import convert_file, save_file, save_folder
from fluxedu.errors import CheckpointError

__all__ = [
    "OFFICIAL",
    "CheckpointError",
    "Merged",
    "Official",
    "config_of",
    "convert",
    "convert_file",
    "converted",
    "extract",
    "find",
    "from_diffusers_config",
    "infer_config",
    "inputs_of",
    "load_into",
    "load_model",
    "merge",
    "outline",
    "read",
    "save_file",
    "save_folder",
    "to_diffusers_config",
    "widen_input",
]
