"""What opsets 25 to 28 have beyond the canonical opset 24, written in it or named.

`Attention` got windows (25), `Range` half precision (27); `SwiGLU` is new (28). `LinearAttention`
and `CausalConvWithState` (27), `BitCast` and `CumProd` (26) have no form at opset 24. Everything
else only takes more types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from onnx import defs

from omforge import ir
from omforge.ir.values import attribute
from omforge.recognition.views import shape_of
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import Names, insert, splice

NEWEST = 28
"""The last opset that was read."""

_TINY = ("FLOAT6E2M3", "FLOAT6E3M2", "UINT2", "INT2")
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_BY = "convert-opset"


def convert(model: ir.Model, node: ir.Node, target: int, names: Names) -> bool:
    """Write a node of a newer opset at opset `target`; whether it changed.

    Args:
        model: The model, its shapes inferred.
        node: A node of the default domain.
        target: 24.
        names: The model's names.

    Raises:
        InputError: The node has no form there.
    """
    change = _CHANGES.get(node.op_type)
    if change is not None:
        return change(model, node, names)
    for value in node.outputs:
        if value.dtype is not None and value.dtype.name in _TINY:
            raise _unknown(node, target, f"{value.dtype} came later")
    if not defs.has(node.op_type, "") or _since(node.op_type) <= target:
        return False
    raise _unknown(node, target, "the operator came later")


def _since(op_type: str) -> int:
    """The first opset that has an operator."""
    versions = [
        schema.since_version
        for schema in defs.get_all_schemas_with_history()
        if schema.name == op_type and schema.domain == ""
    ]
    return min(versions)


def _unknown(node: ir.Node, target: int, why: str) -> ir.InputError:
    return ir.InputError(
        f"{node.op_type} {node.name} cannot be written at opset {target}",
        f"{why}, and omforge's canonical level is opset {target}",
        f"Export with opset {target} or lower, where exporters write it out",
    )


def _attention(model: ir.Model, node: ir.Node, names: Names) -> bool:
    """`left_window_size` and `right_window_size` become part of the mask."""
    left = attribute(node, "left_window_size", -1)
    right = attribute(node, "right_window_size", -1)
    given = (
        node.attributes.pop("left_window_size", None),
        node.attributes.pop("right_window_size", None),
    )
    if left < 0 and right < 0:
        return given != (None, None)
    q, k, past = (_input(node, index) for index in (0, 1, 4))
    rank = len(shape_of(q))
    if rank not in (3, 4) or _input(node, 6) is not None:
        raise _unknown(node, 24, "it has a window over a cache of fixed capacity, or no known rank")
    with Builder(model, node.graph if isinstance(node.graph, ir.Graph) else None) as op:
        seq, total = (op.Shape(value, start=rank - 2, end=rank - 1) for value in (q, k))
        offset = op.constant(np.array(0, dtype=np.int64))
        if past is not None:
            length = op.Shape(past, start=2, end=3)
            total, offset = op.Add(length, total), op.Squeeze(length)
        everything = op.constant(np.array(True))
        seen = op.Expand(everything, op.Concat(seq, total, axis=0))
        if right >= 0:
            seen = op.Trilu(seen, op.Add(offset, np.array(right, dtype=np.int64)), upper=0)
        if left >= 0:
            seen = op.Trilu(seen, op.Sub(offset, np.array(left, dtype=np.int64)), upper=1)
        mask = _input(node, 3)
        if mask is not None and mask.dtype == ir.DataType.BOOL:
            seen = op.And(mask, seen)
        elif mask is not None:
            dtype = mask.dtype or ir.DataType.FLOAT
            seen = op.Where(seen, mask, op.constant(np.array(float(dtype.min), dtype.numpy())))
        insert(op, node, by=_BY, names=names)
    node.resize_inputs(max(len(node.inputs), 4))
    node.replace_input_with(3, seen)
    return True


def _range(model: ir.Model, node: ir.Node, names: Names) -> bool:
    """In half precision it counts in float32, which opset 11 has."""
    stash = node.attributes.pop("stash_type", None)
    dtype = node.outputs[0].dtype
    if dtype is None or dtype not in _HALVES:
        return stash is not None
    if stash is not None and stash.as_int() != int(ir.DataType.FLOAT):
        raise _unknown(node, 24, f"it counts in {ir.DataType(stash.as_int())}")
    with Builder(model, node.graph if isinstance(node.graph, ir.Graph) else None) as op:
        wide = [op.Cast(value, to=int(ir.DataType.FLOAT)) for value in node.inputs]
        new = op.Cast(op.Range(*wide), to=int(dtype))
        splice(op, [node.outputs[0]], [new], by=_BY, names=names)
    return True


def _swiglu(model: ir.Model, node: ir.Node, names: Names) -> bool:
    with Builder(model, node.graph if isinstance(node.graph, ir.Graph) else None) as op:
        alpha = attribute(node, "alpha", 1.0)
        new = op.Mul(op.Swish(node.inputs[0], alpha=alpha), node.inputs[1])
        splice(op, [node.outputs[0]], [new], by=_BY, names=names)
    return True


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


_CHANGES: Mapping[str, Callable[[ir.Model, ir.Node, Names], bool]] = {
    "Attention": _attention,
    "Range": _range,
    "SwiGLU": _swiglu,
}
