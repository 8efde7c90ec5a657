"""Explorers: a run under the reader's hand, in a notebook.

    from fluxedu import widgets
    widgets.attention(pipe, "a red circle left of a blue square")

Each is a pure function of tensors (``attention_view``) and a thin widget around it; each answers to the mouse and the
keyboard, shows a static figure where no kernel is, and fetches nothing.
"""

from fluxedu.widgets.architecture import architecture
from fluxedu.widgets.attention import attention
from fluxedu.widgets.bench import bench
from fluxedu.widgets.blind import blind
from fluxedu.widgets.contributions import contributions
from fluxedu.widgets.explorer import Explorer, View
from fluxedu.widgets.grid import grid
from fluxedu.widgets.heads import heads
from fluxedu.widgets.latents import latents
from fluxedu.widgets.modulation import modulation
from fluxedu.widgets.parameters import parameters
from fluxedu.widgets.particles import particles
from fluxedu.widgets.positions import positions
from fluxedu.widgets.similarity import similarity
from fluxedu.widgets.solvers import solvers
from fluxedu.widgets.streams import streams
from fluxedu.widgets.strength import strength
from fluxedu.widgets.tokens import tokens
from fluxedu.widgets.trajectory import trajectory
from fluxedu.widgets.velocity import velocity

__all__ = [
    "Explorer",
    "View",
    "architecture",
    "attention",
    "bench",
    "blind",
    "contributions",
    "grid",
    "heads",
    "latents",
    "modulation",
    "parameters",
    "particles",
    "positions",
    "similarity",
    "solvers",
    "strength",
    "streams",
    "tokens",
    "trajectory",
    "velocity",
]
