"""A cache that the graph writes, by GE's operators: forms of the front air.

TensorScatter (opset 24) with the cache [B, K, C, D], new slots [B, K, S, D] and the slot [B] of the
first: what comes out is the cache, and shares its memory.
"""

from __future__ import annotations

import numpy as np

from omforge import ir
from omforge.ir.dims import Dim
from omforge.lowering.legalize import ge_choices
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    Results,
    dims,
    int_attribute,
    number,
    required_input,
)
from omforge.lowering.target import Target

_SCATTERED = {
    "310p": (ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT8),
    "910b": (ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.BFLOAT16),
}
_SCATTERED_ND = {
    "310p": (ir.DataType.FLOAT16, ir.DataType.FLOAT),
    "910b": (ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.INT8),
}
_LIKE = {"310p": "310p", "310b": "310p"}


def in_place_obstacle(target: Target, dtype: ir.DataType) -> str:
    """Why no operator writes a cache of that dtype in place; "" where one does."""
    family = target.family.name
    like = _LIKE.get(family, "910b")
    has_scatter = any(
        row.op == "TensorScatter" and row.form == "Scatter" and family in row.families
        for row in ge_choices.GE_CHOICES
    )
    takes = {*_SCATTERED_ND[like], *(_SCATTERED[like] if has_scatter else ())}
    if dtype in takes:
        return ""
    missing = "" if has_scatter else "no Scatter, and "
    return f"{family} has {missing}ScatterNdUpdate for no {dtype.name.lower()}"


def scatter(op: Builder, node: ir.Node) -> Results:
    """As Scatter: rows of each head from one slot on."""
    cache, new, indices = _operands(node)
    _check_dtype(op, cache, _SCATTERED, "Scatter")
    operands = {"var": cache, "indices": indices, "updates": new}
    result = [(cache.dtype, dims(cache))]
    return op.ge("Scatter", operands, result, reduce="update", axis=-2)


def scatter_nd_update(op: Builder, node: ir.Node) -> Results:
    """As ScatterNdUpdate: every row by its numbers, which are made once for all layers."""
    cache, new, indices = _operands(node)
    _check_dtype(op, cache, _SCATTERED_ND, "ScatterNdUpdate")
    seq = dims(new)[2]
    batch, heads = (number(dim, "a size of the new slots") for dim in dims(new)[:2])
    dtype = indices.dtype or ir.DataType.INT64

    def make() -> ir.Value:
        start = op.reshape(indices, (batch, 1, 1, 1))
        # Sizes that gears set come in by what is added: nothing is expanded to a shape.
        heads_of = op.constant(np.zeros((1, heads, 1, 1)), dtype)
        slot = op.add(op.add(start, _steps(op, seq, batch, dtype)), heads_of)
        row, head = np.meshgrid(np.arange(batch), np.arange(heads), indexing="ij")
        fixed = op.constant(np.stack([row, head], -1)[:, :, None], dtype)
        return op.concat([op.add(op.mul(slot, 0), fixed), slot], axis=-1)

    numbers = op.shared(("slots", indices, batch, heads, seq), make)
    operands = {"var": cache, "indices": numbers, "updates": new}
    return op.ge("ScatterNdUpdate", operands, [(cache.dtype, dims(cache))])


def _steps(op: Builder, seq: Dim, batch: int, dtype: ir.DataType) -> ir.Value:
    """The numbers 0 to S-1, [1 or B, 1, S, 1]; of an S that gears set, counted on the tokens."""
    if isinstance(seq, int):
        return op.constant(np.arange(seq).reshape(1, 1, seq, 1), dtype)
    tokens = next(
        (
            value
            for value in op.inputs
            if value.dtype in (ir.DataType.INT32, ir.DataType.INT64) and dims(value) == (batch, seq)
        ),
        None,
    )
    if tokens is None:
        raise NotLegal(f"no input has a number for each of the {seq} tokens")
    here = op.emit("Equal", [tokens, tokens], ir.DataType.BOOL, (batch, seq))
    axis = op.constant(1, ir.DataType.INT32)
    counted = op.emit(
        "CumSum", [op.cast(here, ir.DataType.INT32), axis], ir.DataType.INT32, (batch, seq)
    )
    steps = op.cast(op.add(counted, -1), dtype)
    return op.reshape(steps, (batch, 1, seq, 1))


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    cache, new, indices = (required_input(node, index) for index in range(3))
    if int_attribute(node, "axis", -2) not in (-2, 2) or len(dims(cache)) != 4:
        raise NotLegal("what is written are no slots of a cache [B, K, C, D]")
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "linear":
        raise NotLegal(f"its mode is {mode.as_string()}")
    if not cache.is_graph_input():
        raise NotLegal("only an input of the graph can be written in place")
    return cache, new, indices


def _check_dtype(
    op: Builder, cache: ir.Value, table: dict[str, tuple[ir.DataType, ...]], name: str
) -> None:
    family = op.target.family.name
    takes = table[_LIKE.get(family, "910b")]
    if cache.dtype not in takes:
        raise NotLegal(f"{name} takes no {cache.dtype} on {family}")
