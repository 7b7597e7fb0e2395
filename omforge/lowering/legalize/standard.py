"""Standard operators that ATC registers and whose plugins do not do all that ONNX says.

Each function returns what stands in for a node, or None where the node is fine as it is. What a
plugin refuses or drops is stated beside it, with the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from omforge import ir
from omforge.ir.values import constant
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    Results,
    dims,
    int_attribute,
    number,
    optional_input,
    required_input,
    used_output,
)
from omforge.lowering.value_bounds import sign_of_mod_differs

_FAR = 2**31 - 1


def shape_of_some_axes(op: Builder, node: ir.Node) -> Results | None:
    """Shape with start or end: the plugin reads neither and gives the whole shape.

    Source: hicann/ops-math:math/shape/framework/shape_onnx_plugin.cpp.
    """
    if "end" not in node.attributes and not int_attribute(node, "start", 0):
        return None
    x = required_input(node, 0)
    rank = len(dims(x))
    start, end, _ = slice(
        int_attribute(node, "start", 0), int_attribute(node, "end", rank)
    ).indices(rank)
    whole = op.emit("Shape", [x], ir.DataType.INT64, (rank,))
    bounds = [op.constant([at], ir.DataType.INT64) for at in (start, end)]
    return (op.emit("Slice", [whole, *bounds], ir.DataType.INT64, (max(end - start, 0),)),)


def clip_without_bounds(op: Builder, node: ir.Node) -> Results | None:
    """Clip that clips nothing: the plugin wants a bound.

    Source: hicann/ops-math:conversion/clip_by_value/framework/clip_onnx_plugin.cpp.
    """
    if any(value is not None for value in node.inputs[1:]):
        return None
    return (required_input(node, 0),)


def mod_with_the_sign_of_the_divisor(op: Builder, node: ir.Node) -> Results | None:
    """Mod of integers without fmod, as Mod(Mod(x, y) + y, y) with fmod=1.

    GE's Mod is x - trunc(x / y) * y, and the plugin drops fmod: with fmod=1 it is right as it is,
    and so is one whose operands are never negative.
    Source: hicann/ops-math:math/mod/op_graph/mod_proto.h; math/mod/framework/mod_onnx_plugin.cpp.
    """
    if not sign_of_mod_differs(node):
        return None
    x, y = required_input(node, 0), required_input(node, 1)
    shape = dims(node.outputs[0])
    remainder = op.emit("Mod", [x, y], x.dtype, shape, fmod=1)
    return (op.emit("Mod", [op.add(remainder, y), y], x.dtype, shape, fmod=1),)


def gather_nd_in_batches(op: Builder, node: ir.Node) -> Results | None:
    """GatherND with batch_dims, the batch's own numbers in front of each index.

    Source: hicann/ops-nn:index/gather_nd/framework (only batch_dims=0 is supported).
    """
    batch_dims = int_attribute(node, "batch_dims", 0)
    if not batch_dims:
        return None
    data, indices = required_input(node, 0), required_input(node, 1)
    outer = [number(dim, "a batch dim of GatherND") for dim in dims(indices)[:-1]]
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in outer), indexing="ij"), axis=-1)
    dtype = indices.dtype or ir.DataType.INT64
    whole = op.concat([op.constant(grid[..., :batch_dims], dtype), indices], axis=-1)
    shape = dims(node.outputs[0])
    return (op.emit("GatherND", [data, whole], data.dtype, shape),)


def top_k_with_wide_indices(op: Builder, node: ir.Node) -> Results | None:
    """TopK: GE's indices are int32, whatever ONNX says, so that int64 partners would not fit.

    A Cast to int64 changes nothing for ONNX, and makes the dtype in GE what ONNX says it is.
    Source: hicann/ops-nn:common/src/framework/topk_onnx_plugin.cpp; the prototype's DT_INT32.
    """
    readers = node.outputs[1].consumers()
    if not used_output(node, 1) or {reader.op_type for reader in readers} <= {"Cast"}:
        return None
    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    values, indices = op.record(
        "TopK",
        [required_input(node, 0), required_input(node, 1)],
        [(value.dtype, dims(value)) for value in node.outputs],
        attributes,
    )
    wide = op.emit("Cast", [indices], ir.DataType.INT64, dims(indices), to=int(ir.DataType.INT64))
    return values, wide


def one_hot_of_one_dtype(op: Builder, node: ir.Node) -> Results | None:
    """OneHot: the plugin adds depth to the indices, so both are of one dtype.

    Source: hicann/ops-math:math/one_hot/framework/onehot_onnx_plugin.cpp.
    """
    indices, depth, values = (required_input(node, index) for index in range(3))
    if indices.dtype == depth.dtype or indices.dtype is None:
        return None
    numbers = constant(depth)
    same = op.cast(depth, indices.dtype) if numbers is None else op.constant(numbers, indices.dtype)
    shape, axis = dims(node.outputs[0]), int_attribute(node, "axis", -1)
    return (op.emit("OneHot", [indices, same, values], values.dtype, shape, axis=axis),)


def pad_of_some_axes(op: Builder, node: ir.Node) -> Results | None:
    """Pad with axes (opset 18): opset 16 pads all axes."""
    axes = optional_input(node, 3)
    if axes is None:
        return None
    chosen, given = constant(axes), constant(required_input(node, 1))
    if chosen is None or given is None:
        raise NotLegal("Pad with axes or pads that are computed")
    data = required_input(node, 0)
    rank, half = len(dims(data)), given.size // 2
    pads = np.zeros(2 * rank, np.int64)
    for at, axis in enumerate(chosen.ravel()):
        pads[axis % rank], pads[axis % rank + rank] = given[at], given[at + half]
    fill = optional_input(node, 2)
    inputs = [data, op.constant(pads, ir.DataType.INT64), *([fill] if fill is not None else [])]
    mode = node.attributes.get("mode")
    name = "constant" if mode is None else mode.as_string()
    return (op.emit("Pad", inputs, data.dtype, dims(node.outputs[0]), mode=name),)


def mish(op: Builder, node: ir.Node) -> Results | None:
    """Mish, registered at opset 18 only: x * tanh(softplus(x))."""
    x = required_input(node, 0)
    return (op.mul(x, op.unary("Tanh", op.unary("Softplus", x))),)


STANDARD: Mapping[str, Callable[[Builder, ir.Node], Results | None]] = {
    "Clip": clip_without_bounds,
    "GatherND": gather_nd_in_batches,
    "Mish": mish,
    "Mod": mod_with_the_sign_of_the_divisor,
    "OneHot": one_hot_of_one_dtype,
    "Pad": pad_of_some_axes,
    "Shape": shape_of_some_axes,
    "TopK": top_k_with_wide_indices,
}
