"""Bodies of GE operators that multiply matrices, of floats and of integers, and that quantise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from omforge.air.graph import Desc
from omforge.air.reference.between import FLOAT
from omforge.air.reference.builder import Body, Call, Twin
from omforge.air.reference.elementwise import narrow, wide

_PACKED = 8
"""int4 in an int32, the first in the lowest bits."""


def _turned(twin: Twin, x: str, rank: int) -> str:
    """X with its last two axes exchanged."""
    order = list(range(rank))
    order[-1], order[-2] = order[-2], order[-1]
    return twin.op("Transpose", x, perm=order)


def _matmul(first: str, second: str) -> Body:
    """The attributes that turn x1 and x2 are named so."""

    def body(twin: Twin, call: Call) -> list[str]:
        a, b = call.input("x1"), call.input("x2")
        dtype = call.desc("x1").dtype
        if dtype == "int8":
            dtype = FLOAT if twin.floats.intersection((a, b)) else "int32"
            a, b = (twin.cast(x, dtype) for x in (a, b))
        if call.flag(first):
            a = _turned(twin, a, len(call.shape("x1")))
        if call.flag(second):
            b = _turned(twin, b, len(call.shape("x2")))
        y = twin.op("MatMul", a, b)
        bias = call.input("bias")
        if bias:
            if call.desc("bias").dtype != dtype:
                bias = twin.cast(bias, dtype)
            y = twin.op("Add", y, bias)
        return [y]

    return body


def _weight_quant(twin: Twin, call: Call) -> list[str]:
    """Y = x @ ((weight + offset) * scale) + bias; a group of g rows of the weight has one scale.

    Source: hicann/ops-nn:matmul/weight_quant_batch_matmul_v2/docs/
    aclnnWeightQuantBatchMatmulV2.md.
    """
    if call.input("quant_scale"):
        raise call.fault("it quantises its result")
    dtype, turned = call.desc("x").dtype, call.flag("transpose_weight")
    weight, shape = _unpacked(twin, call, "weight")
    group = call.integer("antiquant_group_size", 0)
    x = call.input("x")
    if call.flag("transpose_x"):
        x = _turned(twin, x, len(call.shape("x")))
    numbers = twin.cast(weight, dtype)
    offset = call.input("antiquant_offset")
    if offset:
        by = _by_group(twin, call, "antiquant_offset", offset, shape, turned, group)
        numbers = twin.op("Add", numbers, by)
    scale = _by_group(
        twin, call, "antiquant_scale", call.input("antiquant_scale"), shape, turned, group
    )
    numbers = twin.op("Mul", numbers, scale)
    y = twin.op("MatMul", x, _turned(twin, numbers, 2) if turned else numbers)
    bias = call.input("bias")
    if bias:
        y = twin.op("Add", y, twin.cast(bias, dtype))
    return [y]


def _unpacked(twin: Twin, call: Call, name: str) -> tuple[str, tuple[int, ...]]:
    """A weight as int8 or int4, whatever its file says, and its shape."""
    desc, value = call.desc(name), call.input(name)
    shape = call.shape(name)
    if desc.dtype != "int32":
        return value, shape
    whole = (*shape[:-1], shape[-1] * _PACKED)
    if twin.is_constant(value):
        return twin.respelled(call, value, Desc(desc.name, "int4", whole)), whole
    # Gathered by a step: two's complement of 4 bits, every step of which int32 holds exactly.
    words = twin.reshape(value, (*shape, 1))
    powers = twin.constant(np.array([16**at for at in range(_PACKED)]), "int32")
    sixteen, eight = (twin.constant(np.array(number), "int32") for number in (16, 8))
    above = twin.op("Sub", words, twin.op("Mod", words, powers))
    nibbles = twin.op("Mod", twin.op("Div", above, powers), sixteen)
    turned = twin.op("Mod", twin.op("Add", nibbles, eight), sixteen)
    return twin.reshape(twin.op("Sub", turned, eight), whole), whole


def _by_group(
    twin: Twin,
    call: Call,
    name: str,
    value: str,
    shape: tuple[int, ...],
    turned: bool,
    group: int,
) -> str:
    """Scales [N], [G, N] or, turned, [N, G], at the weight's size [K, N] or [N, K]."""
    of = call.shape(name)
    if not group or len(of) < 2:
        flat = twin.reshape(value, [-1])
        return twin.reshape(flat, [-1, 1]) if turned else flat
    inputs = shape[1] if turned else shape[0]
    axis = 1 if turned else 0
    rows = twin.constant(np.arange(inputs, dtype=np.int64) // group)
    return twin.op("Gather", value, rows, axis=axis)


def _quant_matmul(twin: Twin, call: Call) -> list[str]:
    """Y = (x1 @ x2 + bias) * scale * pertoken_scale, x1 and x2 of int8, summed in int32.

    Source: hicann/ops-nn:matmul/quant_batch_matmul_v3/docs/aclnnQuantMatmulV4.md.
    """
    if call.input("offset"):
        raise call.fault("it has an offset")
    a, b = call.input("x1"), call.input("x2")
    if call.flag("transpose_x1"):
        a = _turned(twin, a, len(call.shape("x1")))
    if call.flag("transpose_x2"):
        b = _turned(twin, b, len(call.shape("x2")))
    if call.input("x1") in twin.floats:
        total = twin.op("MatMul", twin.cast(a, FLOAT), twin.cast(b, FLOAT))
        sums = FLOAT
    else:
        total, sums = twin.op("MatMulInteger", a, b), "int32"
    if call.input("bias") and call.desc("bias").dtype == "int32":
        bias = call.input("bias")
        total = twin.op("Add", total, bias if sums == "int32" else twin.cast(bias, sums))
    y = twin.op("Mul", twin.cast(total, "float32"), _float_scale(twin, call, "scale"))
    if call.input("pertoken_scale"):
        rows = twin.reshape(call.input("pertoken_scale"), [-1, 1])
        y = twin.op("Mul", y, rows)
    if call.input("bias") and call.desc("bias").dtype != "int32":
        y = twin.op("Add", y, wide(twin, call.input("bias"), call.desc("bias").dtype))
    return [twin.cast(y, call.dtype("dtype"))]


def _float_scale(twin: Twin, call: Call, name: str) -> str:
    """A scale in float32; one of 64 bits holds a float32 in its lower half (TransQuantParamV2)."""
    dtype = call.desc(name).dtype
    if dtype not in ("uint64", "int64"):
        return wide(twin, call.input(name), dtype)
    count = int(np.prod(call.shape(name), dtype=np.int64))
    halves = twin.respelled(call, call.input(name), Desc(name, "float32", (count, 2)))
    return twin.op("Gather", halves, twin.constant(np.int64(0)), axis=1)  # the bytes lie so


def _ascend_dequant(twin: Twin, call: Call) -> list[str]:
    """Y = x * deq_scale, from int32: hicann/ops-nn:quant/ascend_dequant/op_graph."""
    if call.flag("sqrt_mode") or call.flag("relu_flag"):
        raise call.fault("it has a square or a relu")
    y = twin.op("Mul", twin.cast(call.input("x"), "float32"), _float_scale(twin, call, "deq_scale"))
    return [twin.cast(y, call.dtype("dtype"))]


def _ascend_quant(twin: Twin, call: Call) -> list[str]:
    """Y = round(x * scale + offset) as int8, in float16 as kernels before 950 compute.

    Source: hicann/ops-nn:quant/ascend_quant/op_graph, tests/assets/golden.py.
    """
    if call.flag("sqrt_mode") or call.dtype("dst_type", "int8") != "int8":
        raise call.fault("it has a square, or its result is no int8")
    x = call.input("x")
    if call.desc("x").dtype != "float16":
        x = twin.cast(x, "float16")
    y = twin.op("Mul", x, twin.constant(call.number("scale", 1.0), "float16"))
    offset = call.number("offset", 0.0)
    if offset:
        y = twin.op("Add", y, twin.constant(offset, "float16"))
    return [as_int8(twin, twin.cast(y, "float32"))]


def _ascend_quant_v2(twin: Twin, call: Call) -> list[str]:
    """Y = round(x * scale + offset), a scale for each place of an axis."""
    if call.flag("sqrt_mode") or call.dtype("dst_type", "int8") != "int8":
        raise call.fault("it has a square, or its result is no int8")
    x = wide(twin, call.input("x"), call.desc("x").dtype)
    y = twin.op("Mul", x, _along(twin, call, "scale"))
    if call.input("offset"):
        y = twin.op("Add", y, _along(twin, call, "offset"))
    return [as_int8(twin, y)]


def _along(twin: Twin, call: Call, name: str) -> str:
    """A scale of one number, of x's rank, or of one axis, in float32."""
    value = wide(twin, call.input(name), call.desc(name).dtype)
    shape, rank = call.shape(name), len(call.shape("x"))
    if len(shape) != 1 or shape[0] == 1:
        return value
    axis = call.integer("axis", -1) % rank
    return twin.reshape(value, [1] * axis + [shape[0]] + [1] * (rank - axis - 1))


def _dynamic_quant(twin: Twin, call: Call) -> list[str]:
    """A scale for each row, max|x| / 127: hicann/ops-nn:quant/dynamic_quant/docs."""
    if call.input("smooth_scales") or call.input("group_index"):
        raise call.fault("it smooths")
    x = wide(twin, call.input("x"), call.desc("x").dtype)
    largest = twin.op("ReduceMax", twin.op("Abs", x), twin.integers([-1]), keepdims=1)
    scale = twin.op("Div", largest, twin.constant(127.0, "float32"))
    shape = [size for size in call.shape("x")[:-1]]
    none = twin.op("Equal", scale, twin.constant(0.0, "float32"))
    divisor = twin.op("Where", none, twin.constant(1.0, "float32"), scale)
    return [as_int8(twin, twin.op("Div", x, divisor)), twin.reshape(scale, shape)]


def as_int8(twin: Twin, y: str) -> str:
    """Round float32 half to even, and saturate; without rounding it stays float32."""
    low, high = (twin.constant(bound, "float32") for bound in (-128.0, 127.0))
    if not twin.rounds:
        cut = twin.op("Clip", y, low, high)
        twin.floats.add(cut)
        return cut
    rounded = twin.op("Round", y)
    return twin.cast(twin.op("Clip", rounded, low, high), "int8")


def _ascend_anti_quant_v2(twin: Twin, call: Call) -> list[str]:
    dtype = call.dtype("dst_type", "float16")
    y = twin.cast(call.input("x"), "float32")
    if call.input("offset"):
        y = twin.op("Add", y, wide(twin, call.input("offset"), call.desc("offset").dtype))
    y = twin.op("Mul", y, wide(twin, call.input("scale"), call.desc("scale").dtype))
    return [narrow(twin, y, dtype)]


BODIES: Mapping[str, Body] = {
    "AscendAntiQuantV2": _ascend_anti_quant_v2,
    "AscendDequant": _ascend_dequant,
    "AscendQuant": _ascend_quant,
    "AscendQuantV2": _ascend_quant_v2,
    "BatchMatMul": _matmul("adj_x1", "adj_x2"),
    "BatchMatMulV2": _matmul("adj_x1", "adj_x2"),
    "DynamicQuant": _dynamic_quant,
    "MatMulV2": _matmul("transpose_x1", "transpose_x2"),
    "QuantBatchMatmulV3": _quant_matmul,
    "WeightQuantBatchMatmulV2": _weight_quant,
}
