"""Weights that com.microsoft stores in blocks of unsigned integers.

Before::

    y = MatMulNBits<K, N, bits=4, block_size=g>(x, w, scales, zero_points)   w uint8 [N, G, g/2]

After::

    y = MatMul(x, Transpose(DequantizeLinear<axis=1, block_size=g>(q, scales, zero)))  q int4 [N, K]

An unsigned integer less half its range is the same bits with the highest one turned over, so q is
as many bytes as w and neither is in memory: they are turned when they are written.

Letters: K inputs, N outputs (or V rows of an embedding), g the block size, G = ceil(K/g).

Sources: the operators' own documentation in ONNX Runtime 1.32 (`get_all_operator_schema`), and
microsoft/onnxruntime-genai:src/python/py/models, which writes them.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.streamed import ViewTensor
from omforge.ir.values import attribute, constant_tensor, dims
from omforge.quantization.blockwise import Scheme, packed_integers
from omforge.quantization.calibrate import StoredWeight
from omforge.quantization.dequantize import dequantized, gathered_rows
from omforge.quantization.signed import signed_initializer
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch

Array = npt.NDArray[Any]

_BLOCKED = 21
"""The opset that gave DequantizeLinear blocks and integers of 4 bits."""


def matmul_nbits(op: Builder, node: ir.Node) -> list[ir.Value | None]:
    """Raise `MatMulNBits`.

    Raises:
        NoMatch: It has what `DequantizeLinear` has no counterpart of.
    """
    inputs, outputs = int(attribute(node, "K", 0)), int(attribute(node, "N", 0))
    if inputs < 1 or outputs < 1:
        raise NoMatch(f"its weight is {inputs} x {outputs}", node)
    if attribute(node, "weight_prepacked", 0):
        raise NoMatch("its weight is laid out for one GPU", node)
    x = node.inputs[0]
    if x is None:
        raise NoMatch("its input 0 is absent", node)
    made, weight = _weight(op, node, (outputs, inputs), of_weight=1, of_scales=2, of_zeros=3)
    if x.dtype is not None and x.dtype != weight.scale.dtype:
        raise NoMatch(f"its scales are {weight.scale.dtype}, and what it reads is {x.dtype}", node)
    group = _optional(node, 4)
    if group is not None:
        order = np.arange(inputs) // weight.scheme.group
        if not np.array_equal(_constant(group).numpy().reshape(-1)[:inputs], order):
            raise NoMatch("its g_idx puts inputs into other groups than their neighbours'", group)
    y = op.MatMul(x, op.Transpose(dequantized(op, weight, made), perm=[1, 0]))
    bias = _optional(node, 5)
    return [y if bias is None else op.Add(y, bias)]


def gather_block_quantized(op: Builder, node: ir.Node) -> list[ir.Value | None]:
    """Raise `GatherBlockQuantized` where it looks rows of an embedding up.

    Raises:
        NoMatch: It gathers or groups along other axes, or has what has no counterpart.
    """
    data, ids = node.inputs[0], node.inputs[1]
    shape = dims(data) if data is not None else None
    if data is None or ids is None or shape is None or len(shape) != 2:
        raise NoMatch("its data is no matrix", node)
    axes = attribute(node, "gather_axis", 0) % 2, attribute(node, "quantize_axis", 1) % 2
    if axes != (0, 1):
        raise NoMatch(f"it gathers along axis {axes[0]}, with groups along axis {axes[1]}", node)
    if dims(ids) is None:
        raise NoMatch("how many dimensions its row numbers have is not known", ids)
    rows, width = shape
    if not isinstance(rows, int) or not isinstance(width, int):
        raise NoMatch("the shape of its data is not known", data)
    if data.dtype == ir.DataType.UINT8:  # of 4 bits, two are in an element
        width = width * 8 // _bits(node)
    made, weight = _weight(op, node, (rows, width), of_weight=0, of_scales=2, of_zeros=3)
    return [gathered_rows(op, ids, weight, made)]


def _weight(
    op: Builder,
    node: ir.Node,
    shape: tuple[int, int],
    *,
    of_weight: int,
    of_scales: int,
    of_zeros: int,
) -> tuple[list[ir.Value], StoredWeight]:
    """The initializers of integers, scales and zero points, and how they are stored."""
    block = int(attribute(node, "block_size", 128))
    if block < 1:
        raise NoMatch(f"its blocks have {block} integers", node)
    source = _constant(_stored(_need(node, of_weight)))
    scales = _constant(_stored(_need(node, of_scales)))
    zeros = _optional(node, of_zeros)
    bits = _bits(node) if source.dtype == ir.DataType.UINT8 else 4
    if source.dtype not in (ir.DataType.UINT8, ir.DataType.UINT4, ir.DataType.INT4):
        raise NoMatch(f"its integers are {source.dtype}, not UINT8, UINT4 or INT4", node)
    scheme = Scheme(bits, block)
    groups = scheme.groups(shape[1])
    if not all(shape) or shape[1] * bits % 8:
        raise NoMatch(f"a row of {shape[1]} integers of {bits} bits is no number of bytes", node)
    if source.nbytes % shape[0] or shape[0] * shape[1] * bits // 8 > source.nbytes:
        raise NoMatch(f"its weight has {source.nbytes} bytes for {shape[0]} x {shape[1]}", node)
    if scales.size != shape[0] * groups:
        raise NoMatch(f"it has {scales.size} scales for {shape[0]} x {groups} groups", node)
    opset = op.model.opset_imports.get("", 0)
    if opset < _BLOCKED and (bits == 4 or groups > 1):
        raise InputError(
            "a rewrite makes a blocked DequantizeLinear",
            f"it came with opset {_BLOCKED}, and the model has opset {opset}",
            "Run convert-opset before",
        )
    name = source.name or "weight"
    of_scale = (shape[0],) if groups == 1 else (shape[0], groups)
    codes = signed_initializer(op, source, scheme.dtype, shape, f"{name}_int{bits}")
    scale = ViewTensor(scales, scales.dtype, of_scale, f"{scales.name}_blocks")
    made = [codes, op.constant(scale, scale.name or "")]
    zero = _zero_points(node, source, scales.dtype, zeros, (shape[0], groups), bits)
    if zero is not None:
        tensor = packed_integers(zero.reshape(of_scale), scheme.dtype, f"{name}_zero_point")
        made.append(op.constant(tensor, tensor.name or ""))
    weight = StoredWeight(
        shape,
        1,
        Scheme(bits, block, symmetric=zero is None),
        codes.const_value,  # pyright: ignore[reportArgumentType]
        scale,
        None if zero is None else made[2].const_value,
    )
    return made, weight


def _zero_points(
    node: ir.Node,
    source: ir.TensorProtocol,
    floats: ir.DataType,
    value: ir.Value | None,
    shape: tuple[int, int],
    bits: int,
) -> Array | None:
    """Signed zero points int8 [N, G]; None if all are 0."""
    half = 1 << (bits - 1)
    middle = 0 if source.dtype == ir.DataType.INT4 else half
    if value is None:
        if source.dtype == ir.DataType.UINT4:
            return np.full(shape, -half, np.int8)  # it is 0, before half the range was taken off
        return None
    tensor = _constant(_stored(value))
    numbers = tensor.numpy()
    packed = tensor.dtype == ir.DataType.UINT8
    if not packed and tensor.dtype not in (source.dtype, floats):
        raise NoMatch(f"its zero points are {tensor.dtype}", node)
    expected = shape[0] * (-(-shape[1] * bits // 8) if packed else shape[1])
    if numbers.size != expected:
        raise NoMatch(f"it has {numbers.size} zero points, and {expected} belong to it", node)
    if packed:
        rows = numbers.reshape(shape[0], -1)
        if bits == 4:
            rows = np.stack([rows & 15, rows >> 4], axis=-1).reshape(shape[0], -1)
        numbers = rows[:, : shape[1]]
    signed = numbers.reshape(shape).astype(np.float32) - middle
    if (signed != np.round(signed)).any() or (np.abs(signed + 0.5) > half).any():
        raise NoMatch(f"its zero points are no integers of {bits} bits", node)
    return signed.astype(np.int8)


def _bits(node: ir.Node) -> Literal[4, 8]:
    bits = attribute(node, "bits", 4)
    if bits not in (4, 8):
        raise NoMatch(f"its integers have {bits} bits, and DequantizeLinear's 4 or 8", node)
    return 4 if bits == 4 else 8


def _stored(value: ir.Value) -> ir.Value:
    """The value under views: a head's weight is reshaped for the embedding that is tied to it."""
    while (node := value.producer()) is not None and node.op_type in ("Reshape", "Identity"):
        if node.domain or node.inputs[0] is None:
            break
        value = node.inputs[0]
    return value


def _constant(value: ir.Value) -> ir.TensorProtocol:
    tensor = constant_tensor(value)
    if tensor is None:
        raise NoMatch("its integers or their parameters are no constants", value)
    return tensor


def _need(node: ir.Node, index: int) -> ir.Value:
    value = _optional(node, index)
    if value is None:
        raise NoMatch(f"its input {index} is absent", node)
    return value


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
