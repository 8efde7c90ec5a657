"""Pictures of what was recorded: each function takes tensors or :class:`Named` and returns a matplotlib Figure.

``plots.word_maps(lenses.word_maps(pipe, prompt, ["red", "blue"]), image)``. Nothing here runs a model.
"""

from fluxedu.plots.attention import head_gallery, overlay, word_maps
from fluxedu.plots.blocks import contributions, modulation
from fluxedu.plots.elo import elo, elo_axes
from fluxedu.plots.images import film_strip, side_by_side
from fluxedu.plots.parameters import treemap
from fluxedu.plots.spectra import spectrum
from fluxedu.plots.velocity import quiver

__all__ = [
    "contributions",
    "elo",
    "elo_axes",
    "film_strip",
    "head_gallery",
    "modulation",
    "overlay",
    "quiver",
    "side_by_side",
    "spectrum",
    "treemap",
    "word_maps",
]
