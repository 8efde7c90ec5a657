"""A matplotlib figure that a notebook shows although it does not belong to pyplot."""

from __future__ import annotations

from io import BytesIO

from matplotlib import figure


class Figure(figure.Figure):
    """matplotlib's Figure, which Jupyter shows as the value of a cell. Of a plain Figure it shows only the ``repr``,
    until pyplot is imported; pyplot's own way of showing it then comes first, so it is never shown twice.
    """

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        self.savefig(png, format="png", bbox_inches="tight")  # as pyplot's inline backend does
        return png.getvalue()
