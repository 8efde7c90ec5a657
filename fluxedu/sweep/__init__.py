"""Sweeps: prompts x seeds x interventions, by any number of processes, each result written once and whole.

fluxedu sweep gates.yaml --workers 4            into gates/; killed, the same command goes on
torchrun --nproc-per-node 8 -m fluxedu.cli sweep gates.yaml

from fluxedu.sweep import open_sweep
open_sweep("gates")[12]["latent"]
"""

from fluxedu.errors import SweepError
from fluxedu.sweep.config import Cell, Sweep, from_dict, read_config
from fluxedu.sweep.folder import Results, open_sweep
from fluxedu.sweep.run import work

__all__ = ["Cell", "Results", "Sweep", "SweepError", "from_dict", "open_sweep", "read_config", "work"]
