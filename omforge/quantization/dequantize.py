"""A quantised weight in a graph: `DequantizeLinear` for products, rows of it for embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from omforge import ir
from omforge.ir.streamed import ViewTensor
from omforge.ir.values import dims, tensor_shape
from omforge.quantization.blockwise import packed_integers
from omforge.quantization.calibrate import StoredWeight
from omforge.quantization.signed import UnsignedCodes
from omforge.quantization.tensors import QuantizedWeight
from omforge.rewriting.builder import Builder

Weight = QuantizedWeight | StoredWeight


def unsigned(weight: Weight) -> StoredWeight:
    """The same numbers as integers without a sign, each more by half their range.

    What has no zero points has none here: they all are half the range (`half_range`).
    """
    zero = weight.zero_point
    return StoredWeight(
        weight.shape,
        weight.axis,
        weight.scheme,
        UnsignedCodes(weight.codes),
        weight.scale,
        None if zero is None else UnsignedCodes(zero),
    )


def half_range(weight: Weight) -> ir.TensorProtocol:
    """The zero points of unsigned integers that stand for symmetric ones."""
    codes, of_scale = weight.codes, tensor_shape(weight.scale)
    half = np.full(of_scale, 1 << (weight.scheme.bits - 1), np.uint8)
    return packed_integers(half, codes.dtype, f"{codes.name}_zero_point")


def dequantized(op: Builder, weight: Weight, made: Sequence[ir.Value]) -> ir.Value:
    """The weight in floats, of its shape.

    Args:
        op: Records the nodes.
        weight: How it is stored.
        made: The initializers of its integers, scales and, if it has them, zero points.
    """
    if weight.per_channel and len(weight.shape) == 2:
        return op.DequantizeLinear(*made, axis=1 - weight.axis)
    size = weight.scheme.size(weight.shape[weight.axis])
    return op.DequantizeLinear(*made, axis=weight.axis, block_size=size)


def gathered_rows(op: Builder, ids: ir.Value, weight: Weight, made: Sequence[ir.Value]) -> ir.Value:
    """Rows [.., H] of an embedding [V, H] that is stored as integers, without the other rows.

    Args:
        op: Records the nodes.
        ids: Row numbers [..].
        weight: How it is stored, with groups along H.
        made: As for `dequantized`.
    """
    dtype = made[1].dtype
    assert dtype is not None

    def along_row(parameters: ir.Value) -> ir.Value:
        """One number for each row and group, repeated for the row's weights."""
        rows = op.Gather(parameters, ids, axis=0)
        if weight.per_channel:
            return op.Unsqueeze(rows, [-1])
        groups = np.arange(weight.shape[1]) // weight.scheme.group
        return op.Gather(rows, groups, axis=-1)

    if weight.scheme.bits == 8:
        codes = op.Cast(op.Gather(made[0], ids, axis=0), to=int(dtype))
    else:
        codes = _unpacked(op, weight, ids, dtype)
    if weight.zero_point is not None:
        # Gather takes no 4-bit integers.
        zero = op.constant(_floats(weight.zero_point, dtype), f"{weight.zero_point.name}_float")
        codes = op.Sub(codes, along_row(zero))
    elif weight.codes.dtype in (ir.DataType.UINT4, ir.DataType.UINT8):
        codes = op.Sub(codes, op.constant(np.array(1 << (weight.scheme.bits - 1), dtype.numpy())))
    return op.Mul(codes, along_row(made[1]))


def _floats(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(dtype.numpy())),
        dtype=dtype,
        shape=ir.Shape(tensor_shape(tensor)),
    )


def _unpacked(op: Builder, weight: Weight, ids: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Rows of 4-bit integers, by arithmetic that is exact in float16 too.

    Gather takes bytes, so the integers are seen as bytes: the same memory under another type.
    """
    rows, width = weight.shape
    view = ViewTensor(weight.codes, ir.DataType.UINT8, (rows, width // 2))
    pairs = op.Cast(
        op.Gather(op.constant(view, f"{weight.codes.name}_bytes"), ids, axis=0), to=int(dtype)
    )
    sixteen = op.constant(np.array(16, dtype.numpy()))
    second = op.Floor(op.Div(pairs, sixteen))
    first = op.Sub(pairs, op.Mul(second, sixteen))
    halves = op.Concat(op.Unsqueeze(first, [-1]), op.Unsqueeze(second, [-1]), axis=-1)
    flat = op.Reshape(halves, [*[0] * len(dims(ids) or (0, 0)), width])
    if weight.codes.dtype == ir.DataType.UINT4:
        return flat
    # Two's complement: 8 to 15 stand for -8 to -1.
    eight = op.constant(np.array(8, dtype.numpy()))
    return op.Sub(flat, op.Mul(op.Floor(op.Div(flat, eight)), sixteen))
