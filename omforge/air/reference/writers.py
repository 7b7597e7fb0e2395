"""Bodies of GE operators that write one of their inputs: what comes out is what lies there then."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from omforge.air.reference.builder import Body, Call, Twin
from omforge.air.reference.elementwise import wide
from omforge.air.reference.linear import as_int8


def _scatter(twin: Twin, call: Call) -> list[str]:
    return [_written(twin, call, call.input("updates"))]


def _written(twin: Twin, call: Call, updates: str) -> str:
    """Var [B, ..., T, ...] with updates [B, ..., q, ...] from place indices[b] of the axis on.

    Source: CANN 8.1.RC1:op_proto/inc/matrix_calculation_ops.h (Scatter).
    """
    _check_floats(twin, call, updates)
    shape, of_index = call.shape("var"), call.shape("indices")
    rank = len(shape)
    axis = call.integer("axis", 0) % rank
    if len(of_index) != 1 or axis == 0:
        raise call.fault("the reference knows one place for each entry of the first axis only")
    if call.text("reduce") not in ("update", "none"):
        raise call.fault(f"the reference knows no reduce of {call.text('reduce')!r}")
    index = twin.cast(call.input("indices"), "int64")
    start = twin.reshape(index, [-1] + [1] * (rank - 1))
    new = twin.op("Shape", updates)
    count = twin.op("Gather", new, twin.constant(np.int64(axis)), axis=0)
    zero, one = (twin.constant(np.int64(number)) for number in (0, 1))
    steps = twin.reshape(twin.op("Range", zero, count, one), [-1] + [1] * (rank - 1 - axis))
    places = twin.op("Expand", twin.op("Add", start, steps), new)
    return twin.op("ScatterElements", call.input("var"), places, updates, axis=axis)


def _check_floats(twin: Twin, call: Call, updates: str) -> None:
    """Both are integers, or neither is: a cache of floats takes nothing that was rounded."""
    if (call.input("var") in twin.floats) != (updates in twin.floats):
        raise call.fault("what it writes is rounded in a way that cannot be left out")


def _quant_update_scatter(twin: Twin, call: Call) -> list[str]:
    """Updates are quantised, x / scale + zero point, ahead of the write.

    Source: hicann/ops-nn:index/quant_update_scatter/docs.
    """
    x = wide(twin, call.input("updates"), call.desc("updates").dtype)
    scale = wide(twin, call.input("quant_scales"), call.desc("quant_scales").dtype)
    x = twin.op("Mul" if call.flag("reciprocal_scale") else "Div", x, scale)
    if call.input("quant_zero_points"):
        x = twin.op("Add", x, twin.cast(call.input("quant_zero_points"), "float32"))
    return [_written(twin, call, as_int8(twin, x))]


def _scatter_update(twin: Twin, call: Call) -> list[str]:
    """Var with rows of its first axis replaced."""
    _check_floats(twin, call, call.input("updates"))
    rows = twin.op("Unsqueeze", twin.cast(call.input("indices"), "int64"), twin.integers([-1]))
    return [twin.op("ScatterND", call.input("var"), rows, call.input("updates"))]


def _scatter_nd_update(twin: Twin, call: Call) -> list[str]:
    _check_floats(twin, call, call.input("updates"))
    index = twin.cast(call.input("indices"), "int64")
    return [twin.op("ScatterND", call.input("var"), index, call.input("updates"))]


BODIES: Mapping[str, Body] = {
    "QuantUpdateScatter": _quant_update_scatter,
    "Scatter": _scatter,
    "ScatterNdUpdate": _scatter_nd_update,
    "ScatterUpdate": _scatter_update,
}
