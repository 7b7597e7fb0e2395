"""Whether a node works row by row: row i of what it makes depends on row i of what it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omforge import ir
from omforge.ir.values import attribute, constant, known_ints
from omforge.recognition.interface import is_weight
from omforge.recognition.views import shape_of
from omforge.rewriting.match import NoMatch

_ELEMENTWISE = {
    *("Abs", "Add", "Cast", "CastLike", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"),
    *("HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow"),
    *("Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish", "Tanh", "Where"),
}
_REDUCTIONS = {"ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare"}
_ALONG = {"LayerNormalization", "RMSNormalization", "Softmax", "Split", "Concat"}
"""Operators that work along an axis; the two norms along all axes from it on."""


def check_row_wise(node: ir.Node, long: Sequence[bool]) -> None:
    """Make sure that a node works row by row.

    Args:
        node: Any node.
        long: Of each input, whether its first axis is that of the rows. What has no such axis must
            be the same for all rows.

    Raises:
        NoMatch: It may mix rows, or move them.
    """
    if node.domain != "" or not _is_row_wise(node, long):
        raise NoMatch(f"{node.op_type} may mix rows", node)


def _is_row_wise(node: ir.Node, long: Sequence[bool]) -> bool:
    shapes = [shape_of(value) for value in node.inputs]
    rank = len(shapes[0])
    rest = node.inputs[1:]
    match node.op_type:
        case kind if kind in _ELEMENTWISE:
            ranks = {len(shape) for shape, rows in zip(shapes, long, strict=True) if rows}
            most = max(ranks, default=0)
            return len(ranks) == 1 and all(
                rows or len(shape) < most or shape[0] == 1
                for shape, rows in zip(shapes, long, strict=True)
            )
        case "MatMul":
            weight = node.inputs[1]
            fits = weight is not None and is_weight(weight) and len(shapes[1]) == 2
            return long[0] and rank > 1 and fits
        case kind if kind in _ALONG:
            axis = attribute(node, "axis", 0 if kind == "Split" else -1)
            together = all(long) if kind == "Concat" else long[0] and not any(long[1:])
            return together and rank > 1 and axis % rank != 0
        case "Transpose":
            return long[0] and attribute(node, "perm", (1,))[0] == 0
        case "Unsqueeze" | "Squeeze" | "Slice" | _ if not long[0] or any(long[1:]):
            return False
        case "Unsqueeze":
            axes = known_ints(rest[0])
            return axes is not None and all(axis % (rank + len(axes)) for axis in axes)
        case "Squeeze":
            axes = known_ints(rest[0]) if rest else None
            return axes is not None and all(axis % rank for axis in axes)
        case "Slice":
            axes = known_ints(rest[2]) if len(rest) > 2 else None
            return axes is not None and all(axis % rank for axis in axes)
        case kind if kind in _REDUCTIONS:
            axes = known_ints(rest[0]) if rest else None
            return bool(axes) and all(axis % rank for axis in axes or ())
        case "Expand":
            target = known_ints(rest[0])
            return target is not None and len(target) <= rank and set(target) <= {1}
        case "Reshape":
            return _keeps_rows(known_ints(rest[0]), shapes[0])
        case _:
            return False


def _keeps_rows(target: list[int] | None, shape: Sequence[object]) -> bool:
    """Whether a Reshape to known numbers divides each row alike, and says no number of rows."""
    widths = [dim for dim in shape[1:] if isinstance(dim, int)]
    if target is None or len(widths) != len(shape) - 1 or target[:1] != [-1]:
        return False
    return all(size > 0 for size in target[1:]) and math.prod(target[1:]) == math.prod(widths)


def is_zero(value: ir.Value | None) -> bool:
    """Whether all that a value holds is zero, as far as its makers tell."""
    array = constant(value)
    if array is not None:
        return not array.any()
    node = None if value is None else value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type == "ConstantOfShape":
        fill: ir.TensorProtocol | None = attribute(node, "value")
        return fill is None or not fill.numpy().any()
    source = node.inputs[0] if node.op_type in ("Expand", "Reshape", "Cast") else None
    return source is not None and is_zero(source)
