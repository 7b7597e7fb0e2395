"""Remove nodes that change nothing, and chains of data movement that cancel out.

What has several spellings that give the same numbers (but for the sign of a zero) is written in one
on the way: Neg for 0 - x and x * -1, Sub for a + -b, Where without a Not. The matchers see that one
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from omforge import ir
from omforge.ir.edit import remove_dead, replace_value
from omforge.ir.infer import infer_model
from omforge.ir.values import dims, known_ints
from omforge.recognition.views import is_identity, scalar, trace
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, splice

_SIGNED = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.DOUBLE,
    ir.DataType.INT64,
    ir.DataType.INT32,
)


@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """Remove Identity, casts to the same dtype, neutral arithmetic, and movement that cancels out.

    A chain of Reshape, Transpose, Slice and the like is removed wherever it leaves an earlier value
    as it was, found by running the chain on an index tensor rather than by a list of forms.
    """

    name: ClassVar[str] = "remove-no-ops"

    def run(self, model: ir.Model) -> int:
        """Remove; the number of nodes bypassed, or of nodes and initializers gone if it is more."""
        infer_model(model)
        before = _size(model)
        count = _bypass(model)
        if signs := _write_signs(model):
            count += signs + _bypass(model)  # of two signs nothing may be left
        remove_dead(model)
        return max(count, before - _size(model))


def _bypass(model: ir.Model) -> int:
    count = 0
    for node in list(model.graph):
        count += _turn_where(node)
        output = node.outputs[0] if node.outputs else None
        if output is None or not (output.uses() or output.is_graph_output()):
            continue
        source = _neutral(node) or _cancelled(output)
        if source is not None:
            count += replace_value(output, source)
    return count


def _size(model: ir.Model) -> int:
    return model.graph.num_nodes() + len(model.graph.initializers)


def _neutral(node: ir.Node) -> ir.Value | None:
    """The input that the node hands on unchanged, if it does."""
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return None
    output, first = node.outputs[0], node.inputs[0]
    match node.op_type:
        case "Identity":
            return first
        case "Dropout":
            return first if _is_off(node) else None
        case "Cast" | "CastLike":
            return _cast_source(first, output)
        case "Not" | "Neg":
            inner = first.producer()
            if inner is None or (inner.domain, inner.op_type) != ("", node.op_type):
                return None
            return inner.inputs[0]
        case "Concat":
            return first if len(node.inputs) == 1 else None
        case "Mul" | "Add" | "Div" | "Sub" | "Pow":
            return _neutral_operand(node)
        case _:
            return None


def _cast_source(first: ir.Value, output: ir.Value) -> ir.Value | None:
    """What a cast gives back: its input, or what that was widened from."""
    if first.dtype == output.dtype:
        return first
    node = first.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    if source is None or source.dtype != output.dtype or None in (source.dtype, first.dtype):
        return None
    return source if _holds(first.dtype, source.dtype) else None


def _holds(wide: ir.DataType | None, narrow: ir.DataType | None) -> bool:
    """Whether every number of one dtype is one of the other."""
    if wide is None or narrow is None or ir.DataType.STRING in (wide, narrow):
        return False
    if narrow in (ir.DataType.INT64, ir.DataType.UINT64):  # numpy calls them safe in a double
        return False
    return np.can_cast(narrow.numpy(), wide.numpy(), "safe")


def _turn_where(node: ir.Node) -> int:
    """Where(Not(c), a, b) is Where(c, b, a): the matchers see one of the two."""
    if node.op_type != "Where" or node.domain != "" or node.inputs[0] is None:
        return 0
    condition, shown, other = node.inputs
    inverse = None if condition is None else condition.producer()
    if inverse is None or inverse.op_type != "Not" or inverse.domain != "":
        return 0
    for index, value in enumerate((inverse.inputs[0], other, shown)):
        node.replace_input_with(index, value)
    return 1


def _write_signs(model: ir.Model) -> int:
    """Write Neg for x * -1 and 0 - x, then a - b for a + -b and a + b for a - -b."""
    names: Names | None = None
    count = 0
    for rule in (_negation, _signed_sum):
        for node in list(model.graph):
            if node.domain != "" or node.op_type not in ("Mul", "Div", "Sub", "Add"):
                continue
            with Builder(model) as op:
                new = rule(op, node)
                if new is None:
                    continue
                names = names or Names(model)
                try:
                    splice(op, [node.outputs[0]], [new], by=RemoveNoOps.name, names=names)
                except NoMatch:
                    continue  # of unknown shape: nothing shows that it is the same
                count += 1
    return count


def _negation(op: Builder, node: ir.Node) -> ir.Value | None:
    left, right = node.inputs
    if left is None or right is None or left.dtype not in _SIGNED:
        return None
    shape = dims(node.outputs[0])
    if node.op_type in ("Mul", "Div") and dims(left) == shape and _is_number(right, -1.0):
        return op.Neg(left)
    if dims(right) != shape:
        return None
    if node.op_type == "Mul" and _is_number(left, -1.0):
        return op.Neg(right)
    return op.Neg(right) if node.op_type == "Sub" and _is_number(left, 0.0) else None


def _signed_sum(op: Builder, node: ir.Node) -> ir.Value | None:
    left, right = node.inputs
    if node.op_type not in ("Add", "Sub") or left is None or right is None:
        return None
    opposite = op.Sub if node.op_type == "Add" else op.Add
    for first, second in ((left, right), (right, left))[: 2 if node.op_type == "Add" else 1]:
        negated = second.producer()
        if negated is not None and negated.op_type == "Neg" and negated.domain == "":
            return opposite(first, negated.inputs[0])
    return None


def _is_off(dropout: ir.Node) -> bool:
    """Whether it is in inference mode, and its mask is not used."""
    training = dropout.inputs[2] if len(dropout.inputs) > 2 else None
    if training is not None and known_ints(training) != [0]:
        return False
    return not any(mask.uses() or mask.is_graph_output() for mask in dropout.outputs[1:])


def _neutral_operand(node: ir.Node) -> ir.Value | None:
    left, right = node.inputs[0], node.inputs[1]
    neutral = 0.0 if node.op_type in ("Add", "Sub") else 1.0
    shape = dims(node.outputs[0])
    if shape is None:
        return None
    if _is_number(right, neutral) and left is not None and dims(left) == shape:
        return left
    commutes = node.op_type in ("Add", "Mul")
    if commutes and _is_number(left, neutral) and right is not None and dims(right) == shape:
        return right
    return None


def _is_number(value: ir.Value | None, number: float) -> bool:
    """Whether it is that one number; a vector of ones is a weight (of a norm, untrained)."""
    shape = dims(value) if value is not None else None
    return shape is not None and all(dim == 1 for dim in shape) and scalar(value) == number


def _cancelled(output: ir.Value) -> ir.Value | None:
    """The farthest earlier value that the movement ending here restores."""
    for prefix in trace(output).prefixes():
        if prefix.links and is_identity(prefix):
            return prefix.source
    return None
