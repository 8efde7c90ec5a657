"""Record, change and swap what happens inside a model, and the lenses built on that."""

from fluxedu.instruments import lenses
from fluxedu.instruments.ablation import ablate
from fluxedu.instruments.catalogue import Site, sites
from fluxedu.instruments.interventions import Context, intervene, patch, positions
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.recording import Recording, open_recording
from fluxedu.instruments.swapping import swap
from fluxedu.instruments.tokens import region

__all__ = [
    "Context",
    "Named",
    "Recording",
    "Site",
    "ablate",
    "intervene",
    "lenses",
    "open_recording",
    "patch",
    "positions",
    "record",
    "region",
    "sites",
    "swap",
]
