"""Where weights are while they are not needed: FLUX.1 on cards smaller than FLUX.1.

fe.load("dev", device="cuda", memory="auto")     picks from what is free, and says what it chose
print(fe.memory.table())                         what each size of card is predicted to hold
"""

from fluxedu.errors import OutOfMemory
from fluxedu.memory.opening import open_networks
from fluxedu.memory.placement import MODES, Networks, Placement, choose, modulations
from fluxedu.memory.tables import predicted, table
from fluxedu.memory.tiles import decode_tiled
from fluxedu.memory.visits import Visits

__all__ = [
    "MODES",
    "Networks",
    "Placement",
    "OutOfMemory",
    "Visits",
    "choose",
    "decode_tiled",
    "modulations",
    "open_networks",
    "predicted",
    "table",
]
