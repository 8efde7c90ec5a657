"""Freeing the explorers of a cell that runs again. ipywidgets alone keeps every widget until the kernel ends, and an
explorer holds whole recordings.
"""

from __future__ import annotations

import ipywidgets
from IPython import get_ipython

_SHOWN: dict[str, tuple[str, list[ipywidgets.Widget]]] = {}  # by cell: its last run, and what that run has shown


def close_former(explorer: ipywidgets.Widget) -> None:
    """Note that the cell now running shows ``explorer``; close what only its former runs have shown.

    A cell is known by the ``cellId`` that JupyterLab and VS Code send with each run; without one, nothing is closed.
    """
    shell = get_ipython()
    parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
    cell = parent.get("metadata", {}).get("cellId")
    if not cell:
        return
    run = parent["header"]["msg_id"]
    former_run, former = _SHOWN.get(cell, (run, []))
    _SHOWN[cell] = (run, [*(former if former_run == run else []), explorer])
    still_shown = {id(widget) for _, widgets in _SHOWN.values() for widget in widgets}
    for widget in former:
        if id(widget) not in still_shown:
            widget.close()
