"""What the operators refuse that write into a cache."""

from __future__ import annotations

from collections.abc import Iterator

from omforge.air.ge_types import byte_size
from omforge.lowering.air_legality.limits import NN, limit
from omforge.lowering.air_legality.subject import Call
from omforge.lowering.target import Target

Shape = tuple[int, ...]


def scatter(call: Call, target: Target) -> Iterator[str]:
    """Scatter: updates has var's rank, and its dims but for rows and the axis; axis is -2 or -1."""
    yield from _along_an_axis(call, at_least=2)
    axis = _axis(call)
    if (call.integer("axis") or 0) < -2:
        yield f"the axis is {call.integer('axis')}: from behind, -1 and -2 are taken"
    var = call.tensor("var")
    if axis is None or var.static is None:
        return
    last = len(var.static) - 1
    if axis == last and byte_size(var.dtype or "", var.static[-1:]) % 32:
        yield f"along the last axis, a row of var {var} is no multiple of 32 bytes"


def quant_update_scatter(call: Call, target: Target) -> Iterator[str]:
    """QuantUpdateScatter: as Scatter, quantised along the last axis, rows of 32 bytes."""
    yield from _along_an_axis(call, at_least=3)
    axis, var, updates = _axis(call), call.tensor("var").static, call.tensor("updates").static
    if axis is None or var is None or updates is None or len(var) != len(updates):
        return
    last = len(var) - 1
    if axis in (0, last):
        yield f"the axis {axis} is the first or the last of {list(var)}"
    if call.integer("quant_axis") not in (-1, last):
        yield f"quant_axis is {call.integer('quant_axis')}, not the last axis"
    if call.text("reduce") != "update":
        yield f"reduce is {call.text('reduce')}, not update"
    if target.family.name != "950" and var[-1] % 32:
        yield f"the last dim of var is {var[-1]}, no multiple of 32"
    for name in ("quant_scales", "quant_zero_points"):
        shape = call.tensor(name).static
        if shape is not None and _count(shape) != updates[-1]:
            yield f"{name} {list(shape)} has not {updates[-1]} values"


def _along_an_axis(call: Call, at_least: int) -> Iterator[str]:
    var, indices, updates = (call.tensor(n).static for n in ("var", "indices", "updates"))
    axis = _axis(call)
    if var is None or updates is None or "axis" not in call.op.attributes:
        return
    if axis is None:
        yield f"the axis {call.integer('axis')} is none of {list(var)}"
        return
    if not at_least <= len(var) <= 8 or len(updates) != len(var):
        yield f"var {list(var)} and updates {list(updates)} are not of one rank, {at_least} to 8"
        return
    for at, (own, new) in enumerate(zip(var, updates, strict=True)):
        if (new > own) if at in (0, axis) else (new != own):
            yield f"updates {list(updates)} does not fit into var {list(var)} along axis {axis}"
            break
    if indices is None:
        return
    if len(indices) not in (1, 2) or (len(indices) == 2 and indices[1] != 2):
        yield f"indices {list(indices)} is not [B] or [B, 2]"
    elif indices[0] != updates[0]:
        yield f"{indices[0]} indices for {updates[0]} rows of updates"


def _axis(call: Call) -> int | None:
    """The axis from the front. A missing one is 0 in CANN 8.1 and -1 in newer ones: None."""
    shape, axis = call.tensor("var").static, call.integer("axis")
    if shape is None or axis is None or "axis" not in call.op.attributes:
        return None
    found = axis + len(shape) if axis < 0 else axis
    return found if 0 <= found < len(shape) else None


def axis_is_written(call: Call, target: Target) -> Iterator[str]:
    """The axis of a Scatter is written: releases differ in its default."""
    if "axis" not in call.op.attributes:
        yield "the axis is left to its default, which is 0 in CANN 8.1 and -1 or -2 in newer ones"


def scatter_update(call: Call, target: Target) -> Iterator[str]:
    """ScatterUpdate: updates is of indices.shape + var.shape[1:]."""
    var, indices, updates = (call.tensor(n).static for n in ("var", "indices", "updates"))
    if var is not None and indices is not None and updates is not None:
        wanted = (*indices, *var[1:])
        if not var or updates != wanted:
            yield f"updates {list(updates)} is not {list(wanted)}"


def scatter_nd_update(call: Call, target: Target) -> Iterator[str]:
    """ScatterNdUpdate: updates is of indices.shape[:-1] + var.shape[indices.shape[-1]:]."""
    var, indices, updates = (call.tensor(n).static for n in ("var", "indices", "updates"))
    if var is None or indices is None or updates is None:
        return
    if not indices or not 0 < indices[-1] <= len(var):
        yield f"indices {list(indices)} does not index var {list(var)}"
    elif updates != (*indices[:-1], *var[indices[-1] :]):
        wanted = [*indices[:-1], *var[indices[-1] :]]
        yield f"updates {list(updates)} is not {wanted}"


def _count(shape: Shape) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count


_INDEX = f"{NN}:index"

RULES = (
    limit("air-scatter", ("Scatter",), f"{_INDEX}/scatter/op_graph/scatter_proto.h", scatter),
    limit(
        "air-scatter-axis",
        ("Scatter", "QuantUpdateScatter"),
        f"{_INDEX}/scatter/op_graph/scatter_proto.h",
        axis_is_written,
    ),
    limit(
        "air-quant-update-scatter",
        ("QuantUpdateScatter",),
        f"{_INDEX}/quant_update_scatter/op_graph/quant_update_scatter_proto.h",
        quant_update_scatter,
    ),
    limit(
        "air-scatter-update",
        ("ScatterUpdate",),
        f"{_INDEX}/scatter_update/op_graph/scatter_update_proto.h",
        scatter_update,
    ),
    limit(
        "air-scatter-nd-update",
        ("ScatterNdUpdate",),
        f"{_INDEX}/scatter_nd_update/op_graph/scatter_nd_update_proto.h",
        scatter_nd_update,
    ),
)
