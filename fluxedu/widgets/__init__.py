"""Explorers: a run under the reader's hand, in a notebook.

    from fluxedu import widgets
    widgets.attention(pipe, "a red circle left of a blue square")

Each is a pure function of tensors (``attention_view``) and a thin widget around it; each answers to the mouse and the
keyboard, shows a static figure where no kernel is, and fetches nothing.
"""

from fluxedu.widgets.architecture import architecture
from fluxedu.widgets.attention import attention
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.grid import grid
from fluxedu.widgets.heads import heads
from fluxedu.widgets.latents import latents
from fluxedu.widgets.modulation import modulation
from fluxedu.widgets.positions import positions
from fluxedu.widgets.trajectory import trajectory
from fluxedu.widgets.velocity import velocity

__all__ = [
    "Explorer",
    "View",
    "architecture",
    "attention",
    "grid",
    "heads",
    "latents",
    "modulation",
    "positions",
    "trajectory",
    "velocity",
]
