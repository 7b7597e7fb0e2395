"""When a constant or an attribute is what a pattern says."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.values import constant, dims
from omforge.rewriting.pattern import (
    AXES_OPERATORS,
    Number,
)

SMALL = 4096
"""Constants of more elements are weights: compared by identity, never read."""


def divisor_of(node: ir.Node) -> npt.NDArray[Any] | None:
    """The one float that a Div divides by; None if that is no number, or widens the dividend."""
    dividend, divisor = node.inputs
    array = constant(divisor, 1)
    if array is None or array.size != 1 or dividend is None or divisor is None:
        return None
    if divisor.dtype is None or not divisor.dtype.is_floating_point():
        return None
    widens = array.ndim > 1 and dims(dividend) != dims(node.outputs[0])
    return None if widens else array


def is_inverse(divisor: npt.NDArray[Any], expected: Number | tuple[Number, ...]) -> bool:
    """Whether it is what a dtype holds of 1 / expected, or of 1 / what it holds of that.

    The second is how an optimizer turns a product into a division: rounded twice.
    """
    if isinstance(expected, tuple) or not expected:
        return False
    element = divisor.ravel()[0]
    held = float(np.asarray(expected).astype(divisor.dtype))
    return any(number and _close(element, 1 / number) for number in (float(expected), held))


def equals(array: npt.NDArray[Any], expected: Number | tuple[Number, ...]) -> bool:
    """Whether a constant is a number, or the elements of a list."""
    if array.dtype.kind in "SUO":
        return False
    if isinstance(expected, tuple):
        return array.shape == (len(expected),) and all(map(_close, array, expected))
    if not array.size or not (array == array.flat[0]).all():
        return False
    return _close(array.flat[0], expected)


def _close(element: Any, expected: Number) -> bool:
    """Equal to six digits, or to what the element's dtype holds of the number."""
    if element.dtype.kind in "iub":
        return bool(element == expected)
    held = float(np.asarray(expected).astype(element.dtype))
    return float(element) == held or math.isclose(float(element), expected, rel_tol=1e-6)


def keeps_shape(array: npt.NDArray[Any], value: ir.Value, user: ir.Node | None) -> bool:
    """Whether the user's output has its shape without this constant: a number may stand for it."""
    if array.ndim <= 1 and array.size == 1:
        return True
    if user is None:
        return False
    result = dims(user.outputs[0])
    others = [operand for operand in user.inputs if operand is not None and operand is not value]
    return result is not None and any(dims(operand) == result for operand in others)


def attribute_of(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute as Python has it, axes that are an input included."""
    if name == "axes" and node.op_type in AXES_OPERATORS and len(node.inputs) > 1:
        found = constant(node.inputs[1], SMALL)
        return default if found is None else tuple(found.ravel().tolist())
    attribute = node.attributes.get(name)
    if attribute is not None and attribute.is_ref():
        return f"the function's {attribute.ref_attr_name}"  # equal to nothing that a pattern has
    return default if attribute is None else attribute.value


def equal_attributes(name: str, got: Any, expected: Any, node: ir.Node) -> bool:
    """Whether an attribute is what a pattern says."""
    if got is None or expected is None:
        return got is expected
    if isinstance(expected, float) and isinstance(got, float):
        # Attributes are float32 in the file.
        return math.isclose(got, expected, rel_tol=1e-6)
    if name in ("axis", "axes"):
        return positive_axes(got, node) == positive_axes(expected, node)
    if isinstance(expected, list):
        return got == tuple(cast("list[Any]", expected))
    return got == expected


def positive_axes(axes: Any, node: ir.Node) -> list[int]:
    """Axes counted from the front where the rank is known, as written otherwise."""
    value = node.inputs[0]
    shape = None if value is None else dims(value)
    rank = 0 if shape is None else len(shape)
    if node.op_type == "Unsqueeze" and rank:
        rank += 1 if isinstance(axes, int) else len(axes)
    listed = [axes] if isinstance(axes, int) else axes
    return sorted(axis + rank if axis < 0 else axis for axis in listed)
