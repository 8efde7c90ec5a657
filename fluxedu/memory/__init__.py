"""Where weights are while they are not needed: FLUX.1 on cards that are smaller than FLUX.1.

fe.load("dev", device="cuda", memory="auto")     chooses by the free memory, and says what it chose
print(fe.memory.table())                         what is predicted for each size of card
"""

from fluxedu.errors import OutOfMemory
from fluxedu.memory.offload import WeightStreamer, decode_tiled, open_networks
from fluxedu.memory.placement import MODES, Networks, Placement, choose, memory_advice, modulations, predicted, table

__all__ = [
    "MODES",
    "Networks",
    "OutOfMemory",
    "Placement",
    "WeightStreamer",
    "choose",
    "decode_tiled",
    "memory_advice",
    "modulations",
    "open_networks",
    "predicted",
    "table",
]
