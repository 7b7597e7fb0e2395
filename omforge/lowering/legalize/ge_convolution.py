"""Short convolutions over time, channel by channel, as sums of products: a form of the front air.

GE's Conv2D wants images, and formats of their own for what goes in and out. A causal convolution of
a few taps, as recurrent layers have, is as many shifted products, which every SoC has::

    y[b, c, t] = sum_j x[b, c, t + j] * w[c, j] + bias[c]
"""

from __future__ import annotations

import numpy as np

from omforge import ir
from omforge.ir.values import attribute, constant
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    Results,
    dims,
    number,
    optional_input,
    required_input,
)

MOST = 8
"""Taps; each is a kernel that reads its input."""


def sum_of_taps(op: Builder, node: ir.Node) -> Results:
    """Conv [B, C, T] by [C, 1, k] with as many groups as channels; sums in float32."""
    x, weight = required_input(node, 0), required_input(node, 1)
    shape, of_weight = dims(x), dims(weight)
    if len(shape) != 3 or len(of_weight) != 3 or of_weight[1] != 1:
        raise NotLegal("it is no convolution over time, channel by channel")
    channels, taps = number(of_weight[0], "the channels"), number(of_weight[2], "the taps")
    if attribute(node, "group", 1) != channels or shape[1] != channels:
        raise NotLegal(f"{attribute(node, 'group', 1)} groups of {shape[1]} channels: must be one")
    for name in ("strides", "dilations"):
        if set(attribute(node, name, [1])) != {1}:
            raise NotLegal(f"its {name} are not 1")
    padding = attribute(node, "auto_pad", "NOTSET")
    if padding not in ("NOTSET", "VALID"):
        raise NotLegal(f"its padding is {padding}")
    numbers = constant(weight)
    if numbers is None or taps > MOST:
        raise NotLegal(f"its weight is computed, or has more than {MOST} taps")
    before, behind = attribute(node, "pads", [0, 0])
    dtype = x.dtype or ir.DataType.FLOAT
    wide = op.cast(x, ir.DataType.FLOAT)
    batch = number(shape[0], "the batch")
    parts = [
        op.constant(np.zeros((batch, channels, count)), ir.DataType.FLOAT) if count else None
        for count in (before, behind)
    ]
    if any(parts):
        joined = [part for part in (parts[0], wide, parts[1]) if part is not None]
        wide = op.concat(joined, axis=-1)
    length = number(dims(wide)[2], "the tokens") - taps + 1
    total: ir.Value | None = None
    for tap in range(taps):
        factors = op.constant(numbers[:, :, tap].reshape(1, channels, 1), ir.DataType.FLOAT)
        term = op.mul(_shifted(op, wide, tap, length), factors)
        total = term if total is None else op.add(total, term)
    assert total is not None
    bias = optional_input(node, 2)
    if bias is not None:
        column = op.reshape(op.cast(bias, ir.DataType.FLOAT), (1, channels, 1))
        total = op.add(total, column)
    return (op.cast(total, dtype),)


def _shifted(op: Builder, x: ir.Value, start: int, length: int) -> ir.Value:
    shape = dims(x)
    if (start, length) == (0, shape[2]):
        return x
    bounds = [op.constant([at], ir.DataType.INT64) for at in (start, start + length, 2)]
    return op.emit("Slice", [x, *bounds], x.dtype, (*shape[:2], length))
