"""Dtypes and shapes of a GE graph from its inputs on, whatever the file says of results."""

import pytest

from omforge.air.graph import Air
from omforge.air.reference import ShapeFault, reference
from tests.lowering.air_legality.graphs import Builder, described
from tests.lowering.air_legality.legal import GRAPHS

HALF = "float16"


@pytest.mark.parametrize("name", ["layer", "decode", "decode_int8", "prefill", "gated", "moved"])
def test_it_agrees_with_a_file_that_is_right(name: str) -> None:
    air = GRAPHS[name]()
    stated, inferred = reference(air), reference(air, shapes={})
    assert inferred.model == stated.model
    for place, desc in inferred.results.items():
        other = stated.results[place]
        assert (desc.dtype, desc.shape) == (other.dtype, other.shape), place


def open_rows() -> Air:
    """Two sizes are open; a reshape keeps one of them by a 0, and finds the other."""
    b = Builder()
    x = b.data("x", HALF, 2, 4, -1, -1)
    halves = b.const("halves", "int64", 4, values=(4, 2, -1, 0))
    y = b.op(
        "Reshape", "reshape", {"x": x, "shape": halves}, {"y": (HALF, (4, 2, -1, -1))}, allowzero=0
    )
    return b.air(b.op("Relu", "relu", {"x": y}, {"y": (HALF, (4, 2, -1, -1))}))


def test_open_sizes_are_bound_by_the_inputs() -> None:
    found = reference(open_rows(), shapes={"x": (2, 4, 3, 5)}).results
    assert found["relu", 0].shape == (4, 2, 3, 5)
    assert found["reshape", 0].dtype == HALF


def test_what_the_file_says_of_a_result_is_not_read() -> None:
    air = described(GRAPHS["layer"](), "sum", shape=(7,), dtype="int8")
    assert reference(air, shapes={}).results["sum", 0].shape == (1, 4, 64)


def test_the_operator_that_does_not_take_what_comes_in_is_named() -> None:
    with pytest.raises(ShapeFault, match="Reshape flat does not take what comes in") as told:
        reference(GRAPHS["layer"](), shapes={"x": (1, 5, 64)})
    assert told.value.op.name == "flat"
