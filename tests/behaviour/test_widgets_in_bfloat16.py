"""Every registered explorer opens with a pipeline that calculates in bfloat16, as the official ones do."""

import numpy as np
import pytest
import torch

from fluxedu import widgets


@pytest.fixture(scope="module")
def half(make_pipe):
    return make_pipe().to(torch.bfloat16)


@pytest.mark.parametrize("name", widgets.explorers())
def test_its_example_opens_and_shows_numbers(half, name):
    explorer = widgets.explorers()[name].example(half)
    for panel in explorer.current_view().panels:
        shown = [getattr(panel, part) for part in ("image", "series", "xy") if hasattr(panel, part)]
        for values in shown:
            arrays = values.values() if isinstance(values, dict) else [values]
            assert all(np.isfinite(np.asarray(array, float)).all() for array in arrays)
    explorer.figure().canvas.draw()
