"""Shapes that do not fit in operators of ATC's own, which ONNX has no schema for.

Each rule sees the shapes as far as they are numbers, as in `ge_shape_rules`. Sources: the
`*_infershape.cpp` and the documents of each operator in hicann/ops-nn, ops-math and
mirror-cann/ops-transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from omforge import ir

Shape = tuple[int | None, ...]
Shapes = Sequence[Shape | None]


def _at(shapes: Shapes, index: int) -> Shape | None:
    return shapes[index] if index < len(shapes) else None


def _differ(left: int | None, right: int | None) -> bool:
    return left is not None and right is not None and left != right


def _flag(node: ir.Node, name: str) -> bool:
    found = node.attributes.get(name)
    return found is not None and bool(found.value)


def _product(node: ir.Node, shapes: Shapes) -> str:
    """BatchMatMul, QuantBatchMatMul: the sums are as long, and the batches broadcast."""
    a, b = _at(shapes, 0), _at(shapes, 1)
    if a is None or b is None:
        return ""
    if len(a) < 2 or len(b) < 2:
        return f"operands of {len(a)} and {len(b)} axes, not of 2 or more"
    k = a[-2] if _flag(node, "transpose_x1") else a[-1]
    k2 = b[-1] if _flag(node, "transpose_x2") else b[-2]
    if _differ(k, k2):
        return f"{k} columns meet {k2} rows"
    for left, right in zip(reversed(a[:-2]), reversed(b[:-2]), strict=False):
        if _differ(left, right) and 1 not in (left, right):
            return f"batches of {left} and {right}"
    return ""


def _weight_product(node: ir.Node, shapes: Shapes) -> str:
    """NPUWeightQuantBatchMatmulV2: of a weight that is not packed eight to an int32."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    return "" if weight is None or weight.dtype == ir.DataType.INT32 else _product(node, shapes)


def _masked(node: ir.Node, shapes: Shapes) -> str:
    """NPUScaledMaskedSoftmax: the mask broadcasts to x."""
    x, mask = _at(shapes, 0), _at(shapes, 1)
    if x is None or mask is None:
        return ""
    fits = len(x) == len(mask) and not any(
        _differ(size, of) and of != 1 for size, of in zip(x, mask, strict=True)
    )
    return "" if fits else f"a mask of {list(mask)} does not broadcast to {list(x)}"


def _two_of_one_shape(node: ir.Node, shapes: Shapes) -> str:
    """NPUAddRmsNorm: x1 and x2 are of one shape, gamma of their last axes."""
    x, other, gamma = _at(shapes, 0), _at(shapes, 1), _at(shapes, 2)
    if x is None:
        return ""
    if other is not None and (
        len(x) != len(other) or any(_differ(*pair) for pair in zip(x, other, strict=True))
    ):
        return f"x1 is {list(x)}, x2 {list(other)}"
    if gamma is not None and (
        len(gamma) > len(x)
        or any(_differ(*pair) for pair in zip(reversed(x), reversed(gamma), strict=False))
    ):
        return f"gamma {list(gamma)} is not the last axes of {list(x)}"
    return ""


def _halves(node: ir.Node, shapes: Shapes) -> str:
    """NPUGeglu: the last axis comes in two halves."""
    x = _at(shapes, 0)
    odd = bool(x) and x[-1] is not None and x[-1] % 2 == 1
    return f"the last axis of {list(x or ())} has no halves" if odd else ""


def _scales(node: ir.Node, shapes: Shapes) -> str:
    """AscendDequant: one scale, or one for each of the last axis."""
    x, scale = _at(shapes, 0), _at(shapes, 1)
    if not x or scale is None or len(scale) > 1 or not scale:
        return ""
    fits = scale[0] in (1, None) or not _differ(scale[0], x[-1])
    return "" if fits else f"{scale[0]} scales for {x[-1]} columns"


OWN_OP_RULES: Mapping[str, Callable[[ir.Node, Shapes], str]] = {
    "AscendDequant": _scales,
    "BatchMatMul": _product,
    "NPUAddRmsNorm": _two_of_one_shape,
    "NPUGeglu": _halves,
    "NPUScaledMaskedSoftmax": _masked,
    "NPUWeightQuantBatchMatmulV2": _weight_product,
    "QuantBatchMatMul": _product,
    "WeightQuantBatchMatmulV2": _weight_product,
}
