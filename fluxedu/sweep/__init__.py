"""Sweeps: prompts x seeds x interventions, drawn into one folder by one process or by many.

from fluxedu.sweep import open_sweep, read_config, run_sweep
run_sweep(read_config("gates.yaml"), "gates", workers=4)    # fluxedu sweep gates.yaml --workers 4
open_sweep("gates")[12]["latent"]
"""

from fluxedu.sweep.config import Sweep, from_dict, read_config
from fluxedu.sweep.run import Results, SweepError, open_sweep, run_sweep

__all__ = ["Results", "Sweep", "SweepError", "from_dict", "open_sweep", "read_config", "run_sweep"]
