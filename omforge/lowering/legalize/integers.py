"""QuantizeLinear and DequantizeLinear of values that a step computes, as an int8 cache has them.

ATC registers neither; what they do in arithmetic that every SoC has::

    q = Cast(Clip(Round(x / scale) + zero_point, -128, 127))
    y = (Cast(q) - zero_point) * scale

Weights are no matter of this file: written so, atc would store their floats (see `quantized`).
"""

from __future__ import annotations

import numpy as np

from omforge import ir
from omforge.ir.values import constant
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    Results,
    dims,
    int_attribute,
    optional_input,
    required_input,
)

_INT8 = ir.DataType.INT8


def quantize(op: Builder, node: ir.Node) -> Results:
    """QuantizeLinear to int8; halves go to the even integer, in both."""
    x, result = required_input(node, 0), node.outputs[0]
    if result.dtype != _INT8 or x.dtype is None:
        raise NotLegal(f"QuantizeLinear from {x.dtype} to {result.dtype}: only to int8")
    steps, zero = _parameters(op, node, x.dtype, len(dims(x)))
    rounded = op.unary("Round", op.div(x, steps))
    if zero is not None:
        rounded = op.add(rounded, zero)
    bounds = [op.constant(np.array(bound), x.dtype) for bound in (-128.0, 127.0)]
    clipped = op.emit("Clip", [rounded, *bounds], x.dtype, dims(x))
    return (op.cast(clipped, _INT8),)


def dequantize(op: Builder, node: ir.Node) -> Results:
    """DequantizeLinear of int8 that is computed."""
    x, dtype = required_input(node, 0), node.outputs[0].dtype
    if x.const_value is not None:
        raise NotLegal(
            "a quantised weight has a lowering in products of two dimensions only, and as floats "
            "it would be as large as before: keep this layer as it is"
        )
    if x.dtype != _INT8 or dtype is None:
        raise NotLegal(f"DequantizeLinear from {x.dtype} to {dtype}: only from int8")
    steps, zero = _parameters(op, node, dtype, len(dims(x)))
    floats = op.cast(x, dtype)
    return (op.mul(floats if zero is None else op.sub(floats, zero), steps),)


def _parameters(
    op: Builder, node: ir.Node, dtype: ir.DataType, rank: int
) -> tuple[ir.Value, ir.Value | None]:
    """Scale and zero point along the node's axis, to be broadcast; None for zeros."""
    if int_attribute(node, "block_size", 0):
        raise NotLegal(f"{node.op_type} in blocks")
    axis = int_attribute(node, "axis", 1) % rank
    found: list[ir.Value | None] = []
    for index in (1, 2):
        value = optional_input(node, index)
        numbers = None if value is None else constant(value)
        if value is not None and numbers is None:
            raise NotLegal(f"{node.op_type} with a scale or zero point that is computed")
        if numbers is None or (index > 1 and not np.any(numbers)):
            found.append(None)
            continue
        wide = numbers.astype(np.float32)
        shape = [-1 if at == axis else 1 for at in range(rank)] if wide.ndim else []
        found.append(op.constant(wide.reshape(shape), dtype))
    scale, zero = found
    if scale is None:
        raise NotLegal(f"{node.op_type} without a scale")
    return scale, zero
