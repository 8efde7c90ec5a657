"""What a recording of the pretend FLUX.1-dev would take of the real one: its budget, divided as the sizes are.

    measure()      # in the process that records, after pretend_dev.make_quick()

A value is counted as large as it would be at 1024 x 1024, with 19 + 38 blocks and, where the run's own number of steps
was taken, 50 of them; so the budget of 2 GiB refuses here what it would refuse there.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from math import ceil, prod

from pretend_dev import FLUX, STEPS

from fluxedu.instruments import recorder
from fluxedu.instruments.named import Named
from fluxedu.instruments.recorder import record
from fluxedu.instruments.recording import FolderRecording
from fluxedu.models import FluxConfig
from fluxedu.widgets.architecture import COLUMNS, ROWS, as_table

DEV = FluxConfig.variant("dev")
TOKENS = {128: 512, 144: 4096, 272: 4608}  # the text's, the picture's, all
SIDES = {24: 128, 192: 1024}  # of a latent, of a picture
WIDTHS = {256: DEV.hidden_size, 1024: 4 * DEV.hidden_size, 48: DEV.context_in_dim}
GROWN = {
    **dict.fromkeys(("text", "image", "token", "query", "key"), TOKENS),
    **dict.fromkeys(("row", "column"), SIDES),
    "channel": WIDTHS,
    "head": {FLUX.num_heads: DEV.num_heads},
}
BLOCKS = (DEV.depth + DEV.depth_single_blocks) / (FLUX.depth + FLUX.depth_single_blocks)
UNIT = 4608 * 3072 / (272 * 256) * BLOCKS  # of all tokens in all blocks: what the budget itself is divided by


def grown(axes: tuple[str, ...], shape: tuple[int, ...]) -> float:
    """How many times larger a value of this shape is at full size."""
    return prod(GROWN.get(axis, {}).get(size, size) / size for axis, size in zip(axes, shape, strict=True))


def growth(rec: record, value: Named) -> float:
    """The same of a value that is kept; the tables of the architecture explorer are thinned to one size."""
    if as_table in rec.reductions():
        return max(1, 4 * ROWS * COLUMNS / value.tensor.nbytes) if value.shape[0] > 1 else 1
    return grown(value.axes, value.shape)


def more(rec: record, site: str, moment) -> float:
    """How many times more of them there are: blocks, where the glob names none, and steps, where nobody did."""
    named = any(fnmatchcase(site, g) and re.match(r"(double|single)\.\d+\.", g) for g in rec.globs)
    blocks = BLOCKS if re.match(r"(double|single)\.", site) and not named else 1
    at_once = rec.over_steps or isinstance(rec.recording, FolderRecording) or moment is None or moment.step is None
    return blocks * (50 / STEPS if rec.steps is None and not at_once and moment.steps == STEPS else 1)


def measure() -> None:
    """For the rest of this process."""
    keep, expect = record._keep, record._expect

    def kept(self, site, when, value, moment):
        self.growth = growth(self, value)
        keep(self, site, when, value, moment)

    def expected(self, site, nbytes, moment, when):
        larger = getattr(self, "growth", 1) * more(self, site, moment)
        expect(self, site, ceil(nbytes * larger / UNIT), moment, when)

    record._keep, record._expect = kept, expected
    recorder.BUDGET = int(recorder.BUDGET / UNIT)
