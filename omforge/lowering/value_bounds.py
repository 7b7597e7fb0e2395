"""How small and how large the integers of a tensor can be, as far as the graph says.

For what is right in some range only: GE's Mod for operands that are not negative, OneHot for
indices below its depth, Gather for indices inside its axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.values import constant_tensor, dims, known_ints

_DEPTH = 64
"""How far back a chain of operators is followed."""


_LIMIT = 1 << 16


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind a constant; None of one that has none, as a Constant without a value."""
    try:
        return constant_tensor(value)
    except ValueError:
        return None


def inline_numbers(value: ir.Value | None, limit: int = _LIMIT) -> npt.NDArray[Any] | None:
    """The numbers of a constant inside the model; None of one that is large, outside or damaged."""
    tensor = stored(value)
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > limit:
        return None
    try:
        numbers = tensor.numpy()
    except (ValueError, TypeError, OSError):
        return None  # data of another length or dtype: rules of the message say so
    return numbers if numbers.dtype.kind in "iufb" else None


def integers(value: ir.Value | None) -> list[int] | None:
    """The integers of a constant, or of what is computed of shapes and constants."""
    if value is None or stored(value) is None:
        return _computed(value)
    numbers = inline_numbers(value)
    if numbers is None or not np.issubdtype(numbers.dtype, np.integer):
        return None
    return [int(number) for number in numbers.ravel()]


def _computed(value: ir.Value | None) -> list[int] | None:
    try:
        return known_ints(value)
    except ValueError:
        return None


class Bounds(NamedTuple):
    """The least and the greatest number; None where the graph does not say."""

    low: int | None
    high: int | None


UNKNOWN = Bounds(None, None)


def bounds(value: ir.Value | None, depth: int = _DEPTH) -> Bounds:
    """What the graph says of the integers of a value."""
    if value is None or value.dtype is None or not value.dtype.is_integer():
        return Bounds(0, 1) if value is not None and value.dtype == ir.DataType.BOOL else UNKNOWN
    numbers = inline_numbers(value)
    if numbers is not None and numbers.size:
        return Bounds(int(numbers.min()), int(numbers.max()))
    tracked = integers(value)
    if tracked:
        return Bounds(min(tracked), max(tracked))
    unsigned = value.dtype.name.startswith("UINT")
    node = value.producer()
    rule = None if node is None or node.domain not in ("", "ai.onnx") else _RULES.get(node.op_type)
    found = UNKNOWN
    if node is not None and rule is not None and depth and not _is_top_value(node, value):
        found = rule(node, depth - 1)
    return Bounds(0, found.high) if unsigned and found.low is None else found


def sign_of_mod_differs(node: ir.Node) -> bool:
    """Whether GE's Mod may give another sign: it takes the dividend's, as ONNX's with fmod=1.

    Source: hicann/ops-math:math/mod/op_graph/mod_proto.h; math/mod/framework/mod_onnx_plugin.cpp.
    """
    if node.op_type != "Mod" or node.domain not in ("", "ai.onnx") or not node.inputs:
        return False
    fmod = node.attributes.get("fmod")
    dtype = None if node.inputs[0] is None else node.inputs[0].dtype
    if (fmod is not None and fmod.value) or dtype is None or not dtype.is_integer():
        return False
    lows = [bounds(value).low for value in node.inputs]
    return any(low is None or low < 0 for low in lows)


def one_hot_may_wrap(node: ir.Node) -> bool:
    """Whether an index of OneHot may be at depth or above, where the plugin's Mod wraps it around.

    Source: hicann/ops-math:math/one_hot/framework/onehot_onnx_plugin.cpp.
    """
    if node.op_type != "OneHot" or node.domain not in ("", "ai.onnx") or len(node.inputs) < 2:
        return False
    found, depth = bounds(node.inputs[0]), bounds(node.inputs[1]).low
    if depth is None or found.low is None or found.high is None:
        return True
    return found.low < -depth or found.high >= depth


def _is_top_value(node: ir.Node, value: ir.Value) -> bool:
    return node.op_type == "TopK" and value is node.outputs[0]


def _like(*indices: int) -> Callable[[ir.Node, int], Bounds]:
    """All elements are elements of these inputs."""

    def rule(node: ir.Node, depth: int) -> Bounds:
        return _union([bounds(_input(node, index), depth) for index in indices])

    return rule


def _union(found: list[Bounds]) -> Bounds:
    lows, highs = [each.low for each in found], [each.high for each in found]
    low = None if None in lows or not lows else min(each for each in lows if each is not None)
    high = None if None in highs or not highs else max(each for each in highs if each is not None)
    return Bounds(low, high)


def _all_inputs(node: ir.Node, depth: int) -> Bounds:
    return _union([bounds(value, depth) for value in node.inputs])


def _position(node: ir.Node, depth: int) -> Bounds:
    """An index along an axis of the first input: below the longest of its axes, whichever it is."""
    shape = None if node.inputs[0] is None else dims(node.inputs[0])
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        return Bounds(0, None)
    sizes = [dim for dim in shape if isinstance(dim, int)]
    axis = node.attributes.get("axis")
    if node.op_type in ("ArgMax", "ArgMin", "TopK") and sizes:
        default = -1 if node.op_type == "TopK" else 0
        at = default if axis is None else axis.as_int()
        return Bounds(0, sizes[at % len(sizes)] - 1)
    return Bounds(0, max(sizes, default=1) - 1)


def _at_least_zero(node: ir.Node, depth: int) -> Bounds:
    return Bounds(0, None)


def _add(node: ir.Node, depth: int) -> Bounds:
    left, right = _pair(node, depth)
    return Bounds(_sum(left.low, right.low), _sum(left.high, right.high))


def _sub(node: ir.Node, depth: int) -> Bounds:
    left, right = _pair(node, depth)
    return Bounds(_difference(left.low, right.high), _difference(left.high, right.low))


def _mul(node: ir.Node, depth: int) -> Bounds:
    left, right = _pair(node, depth)
    if left.low is None or right.low is None or left.low < 0 or right.low < 0:
        return UNKNOWN
    high = None if left.high is None or right.high is None else left.high * right.high
    return Bounds(left.low * right.low, high)


def _div(node: ir.Node, depth: int) -> Bounds:
    left, right = _pair(node, depth)
    if left.low is None or right.low is None or left.low < 0 or right.low < 1:
        return UNKNOWN
    return Bounds(0, None if left.high is None else left.high // right.low)


def _mod(node: ir.Node, depth: int) -> Bounds:
    left, right = _pair(node, depth)
    fmod = node.attributes.get("fmod")
    dividends_sign = fmod is not None and bool(fmod.as_int())
    if right.low is None or right.low < 1:
        return UNKNOWN
    high = None if right.high is None else right.high - 1
    negative = dividends_sign and (left.low is None or left.low < 0)
    return Bounds(None if negative else 0, high)


def _min(node: ir.Node, depth: int) -> Bounds:
    found = [bounds(value, depth) for value in node.inputs]
    highs = [each.high for each in found if each.high is not None]
    return Bounds(_union(found).low, min(highs, default=None))


def _max(node: ir.Node, depth: int) -> Bounds:
    found = [bounds(value, depth) for value in node.inputs]
    lows = [each.low for each in found if each.low is not None]
    return Bounds(max(lows, default=None), _union(found).high)


def _clip(node: ir.Node, depth: int) -> Bounds:
    of, least, most = (bounds(_input(node, index), depth) for index in range(3))
    low = least.low if least.low is not None else of.low
    return Bounds(low, most.high if most.high is not None else of.high)


def _range(node: ir.Node, depth: int) -> Bounds:
    start, limit, delta = (bounds(_input(node, index), depth) for index in range(3))
    if delta.low is None or delta.low < 1:
        return UNKNOWN
    return Bounds(start.low, None if limit.high is None else limit.high - 1)


def _pair(node: ir.Node, depth: int) -> tuple[Bounds, Bounds]:
    return bounds(_input(node, 0), depth), bounds(_input(node, 1), depth)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _sum(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else left + right


def _difference(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else left - right


_SAME = _like(0)

_RULES: Mapping[str, Callable[[ir.Node, int], Bounds]] = {
    "Abs": _at_least_zero,
    "Add": _add,
    "ArgMax": _position,
    "ArgMin": _position,
    "Cast": _SAME,
    "Clip": _clip,
    "Concat": _all_inputs,
    "Div": _div,
    "Expand": _SAME,
    "Flatten": _SAME,
    "Gather": _SAME,
    "GatherElements": _SAME,
    "GatherND": _SAME,
    "Identity": _SAME,
    "Max": _max,
    "Min": _min,
    "Mod": _mod,
    "Mul": _mul,
    "NonZero": _position,
    "Range": _range,
    "ReduceMax": _SAME,
    "ReduceMin": _SAME,
    "Relu": _at_least_zero,
    "Reshape": _SAME,
    "ScatterElements": _like(0, 2),
    "ScatterND": _like(0, 2),
    "Shape": _at_least_zero,
    "Size": _at_least_zero,
    "Slice": _SAME,
    "Split": _SAME,
    "Squeeze": _SAME,
    "Sub": _sub,
    "Tile": _SAME,
    "TopK": _position,
    "Transpose": _SAME,
    "Unsqueeze": _SAME,
    "Where": _like(1, 2),
}
