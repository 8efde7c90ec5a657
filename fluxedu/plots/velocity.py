"""The velocity field on a plane of latents, as arrows."""

from __future__ import annotations

from matplotlib.figure import Figure

from fluxedu.instruments.named import Named
from fluxedu.plots.canvas import array, figure, wanted


def quiver(field: Named) -> Figure:
    """:func:`fluxedu.instruments.lenses.velocity_field`: where the sampler would walk from each point of the plane.

    The run is at the cross, the picture it ends at is the star. Straight paths from everywhere to one picture would
    be arrows that all point to the star.
    """
    wanted(field, "up", "across", "what")
    a, b, across, up = array(field).transpose(2, 0, 1)
    fig, ((ax,),) = figure(1, 1, (4.4, 4.0))
    ax.quiver(a, b, across, up, angles="xy", scale_units="xy", scale=3, color="C0", width=0.004)
    ax.plot(0, 0, "x", color="black", markersize=9, label="the run")
    ax.plot(1, 0, "*", color="C3", markersize=13, label="its picture")
    ax.set_aspect("equal")
    ax.set_xlabel("towards the picture", fontsize=8)
    ax.set_ylabel("towards another seed's state", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    ax.set_title("arrows: a third of the way still to go", fontsize=9)
    return fig
