"""Tensors with named axes: arithmetic by the names of axes, held against xarray; means, floats, tables."""

import operator

import numpy as np
import pytest
import torch
import xarray
from hypothesis import given, settings
from hypothesis import strategies as st

import fluxedu as fe
from fluxedu.errors import InstrumentError
from fluxedu.instruments.named import Named

PROMPT = "a red circle left of a blue square"
SIZES = {"step": 2, "head": 3, "token": 4, "channel": 5}
OPERATIONS = [operator.add, operator.sub, operator.mul, operator.truediv]


def value(axes, seed):
    shape = [SIZES[axis] for axis in axes]
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    return Named(tensor, tuple(axes), {"head": ["a", "b", "c"]} if "head" in axes else {})


def as_xarray(named):
    return xarray.DataArray(np.asarray(named), named.coords, named.axes)


some_axes = st.permutations(list(SIZES)).flatmap(lambda axes: st.integers(0, 4).map(lambda n: axes[:n]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(some_axes, some_axes, st.sampled_from(OPERATIONS))
def test_arithmetic_matches_axes_by_name_as_xarray_does(left, right, operation):
    a, b = value(left, 0), value(right, 1)
    found, expected = operation(a, b), operation(as_xarray(a), as_xarray(b))
    assert found.axes == expected.dims and np.array_equal(np.asarray(found), expected.values)
    assert set(found.coords) == set(expected.coords)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_arithmetic_with_numbers_and_tensors(operation):
    a = value(["head", "token"], 0)
    assert torch.equal(operation(a, 2.0).tensor, operation(a.tensor, 2.0)) and operation(a, 2.0).coords == a.coords
    row = torch.rand(4, dtype=torch.float64)
    assert torch.equal(operation(a, row).tensor, operation(a.tensor, row))
    if operation is not operator.truediv:
        assert torch.equal(operation(2.0, a).tensor, operation(2.0, a.tensor))
    assert torch.equal((-a).tensor, -a.tensor) and torch.equal((a - 1).abs().tensor, (a.tensor - 1).abs())


def test_axes_of_other_lengths_do_not_meet():
    other = Named(torch.ones(7), ("token",))
    with pytest.raises(InstrumentError, match="axis 'token' has length 4 here and 7 there"):
        value(["head", "token"], 0) - other
    with pytest.raises(InstrumentError, match=r"a tensor \[7\] does not fit Named\(head: 3, token: 4"):
        value(["head", "token"], 0) - torch.ones(7)


def test_means_and_floats():
    a = value(["step", "head", "token"], 0)
    assert torch.equal(a.mean("head").tensor, a.tensor.mean(1)) and a.mean("head").axes == ("step", "token")
    assert torch.allclose(a.mean("token", "step").tensor, a.tensor.mean((0, 2)))
    assert float(a.mean()) == pytest.approx(float(a.tensor.mean())) and float(a.at(step=1, head=0, token=2)) > 0
    with pytest.raises(InstrumentError, match="only one number can become a float, not Named"):
        float(a)
    with pytest.raises(InstrumentError, match="there is no axis 'row'"):
        a.mean("row")


def test_a_table_has_a_row_for_each_number():
    a = value(["step", "head"], 0)
    table = a.to_pandas()
    assert table.index.names == ["step", "head"] and len(table) == 6
    assert table[1, "b"] == float(a.at(step=1, head=1))


def test_sites_of_equal_shape_share_their_dimensions(pipe):
    with fe.record("single.0.x", "single.0.out", "single.0.mlp_hidden", "vec") as rec:
        pipe(PROMPT, steps=3, height=32, width=48, progress=False)
    found = rec.to_dataset()
    change = found["single.0.out"] - found["single.0.x"]
    assert change.dims == ("step", "token", "channel") and change.shape == rec["single.0.x"].shape
    assert np.array_equal(change.values, np.asarray(rec["single.0.out"] - rec["single.0.x"]))
    hidden = rec["single.0.mlp_hidden"].sizes["channel"]
    assert found["single.0.mlp_hidden"].dims == ("step", "token", f"channel_{hidden}")
    assert list(found.coords["step"].values) == rec["vec"].coords["step"]
