"""The bounds of a request's numbers. Without PyTorch, so that a command can refuse a number at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fluxedu.errors import check_integer, check_number

MAX_STEPS = 1000
MAX_SIDE = 4096  # pixels

CHECKS: dict[str, Callable] = {
    "seed": partial(check_integer, low=0, high=2**63 - 1, hint="any number will do, such as 0"),
    "steps": partial(check_integer, low=1, high=MAX_STEPS, hint="20 is a good start"),
    "guidance": partial(check_number, low=0, high=100, hint="3.5 is usual"),
    "true_cfg_scale": partial(check_number, low=0, high=100, hint="1 is off, 3 to 5 is usual"),
    "strength": partial(check_number, low=0.001, high=1, hint="1 keeps nothing of the image, small values keep much"),
    "height": partial(check_integer, low=16, high=MAX_SIDE, hint="it is in pixels"),
    "width": partial(check_integer, low=16, high=MAX_SIDE, hint="it is in pixels"),
}


def check_setting(name: str, value):
    """``value`` if it is within the bounds of the setting ``name``; raises RequestError otherwise."""
    return CHECKS[name](name, value)


def check_settings(**settings) -> None:
    """:func:`check_setting` for each setting that is not None, which stands for the model's own."""
    for name, value in settings.items():
        if value is not None:
            check_setting(name, value)
