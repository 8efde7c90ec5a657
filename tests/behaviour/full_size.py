"""Charge recordings of the simulated FLUX.1-dev for what they would need of the real one, within a budget to match.

    measure()      # in the process that records, after pretend_dev.make_quick()

A value counts with its size at 1024 x 1024, with 19 + 38 blocks and, unless the steps were chosen, 50 steps. Sizes and
the budget of 2 GiB are divided by the same number, so recordings are refused here as they would be there.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from math import prod

from pretend_dev import FLUX, STEPS

from fluxedu.instruments import recorder
from fluxedu.instruments.recorder import record
from fluxedu.instruments.reductions import Value
from fluxedu.models import FluxConfig
from fluxedu.sampling.step_context import current_context
from fluxedu.widgets.architecture import COLUMNS, ROWS, as_table

DEV = FluxConfig.variant("dev")
TOKENS = {128: 512, 144: 4096, 272: 4608}  # simulated -> real: text tokens, image tokens, both
SIDES = {24: 128, 192: 1024}  # of a latent, of an image
WIDTHS = {256: DEV.hidden_size, 1024: 4 * DEV.hidden_size, 48: DEV.context_in_dim}
REAL_SIZES = {
    **dict.fromkeys(("text", "image", "token", "query", "key"), TOKENS),
    **dict.fromkeys(("row", "column"), SIDES),
    "channel": WIDTHS,
    "head": {FLUX.num_heads: DEV.num_heads},
}
BLOCKS = (DEV.depth + DEV.depth_single_blocks) / (FLUX.depth + FLUX.depth_single_blocks)
UNIT = 4608 * 3072 / (272 * 256) * BLOCKS  # growth of all tokens in all blocks


def size_factor(rec: record, value: Value) -> float:
    """How many times larger a recorded value is in the real model."""
    if as_table in rec.reductions.create():  # tables of the architecture explorer have a limited size
        return max(1, 4 * ROWS * COLUMNS / (4 * value.shape.numel())) if value.shape[0] > 1 else 1
    sizes = zip(value.axes, value.shape, strict=True)
    return prod(REAL_SIZES.get(axis, {}).get(size, size) / size for axis, size in sizes)


def count_factor(rec: record, site: str, context) -> float:
    """How many times more blocks (unless a glob names one) and steps (unless some are chosen) there are."""
    is_of_a_block = re.match(r"(double|single)\.", site)
    is_named = any(fnmatchcase(site, glob) and re.match(r"(double|single)\.\d+\.", glob) for glob in rec.globs)
    blocks = BLOCKS if is_of_a_block and not is_named else 1
    holds_one_step = rec.reductions.over_steps or rec.recording.holds_one_step
    if (
        holds_one_step
        or rec.selection.steps is not None
        or context is None
        or context.step is None
        or context.steps != STEPS
    ):
        return blocks
    return blocks * 50 / STEPS


def measure() -> None:
    """Count this way for the rest of this process."""
    fits, values_in_run = record._fits, recorder.values_in_run
    current: dict = {}  # how many times larger the real value is than the one that a recorder stores now

    def measure_and_fit(self, site, key, value):
        current["larger"] = size_factor(self, value) * count_factor(self, site, current_context())
        return fits(self, site, key, value)

    record._fits = measure_and_fit
    recorder.values_in_run = lambda *arguments: values_in_run(*arguments) * current["larger"] / UNIT
    recorder.BUDGET = int(recorder.BUDGET / UNIT)
