"""What is known of a value: its dims, its constant, the symbolic elements of small integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from omforge.ir.diagnostics import describe
from omforge.ir.dims import Dim, Expr, parse_dim, symbol
from omforge.ir.errors import InputError

MAX_TRACKED = 256
"""Integer tensors up to this many elements carry their symbolic value."""


Dims = tuple[Dim, ...]


Symbolic = npt.NDArray[np.object_]
"""An array of `Dim` or bool."""


KNOWN = "omforge.known"


INTEGERS = {
    ir.DataType.INT64,
    ir.DataType.INT32,
    ir.DataType.BOOL,
    ir.DataType.UINT8,
    ir.DataType.INT8,
}


def dims(value: ir.Value) -> Dims | None:
    """The dimensions of a value as numbers and expressions, or None where the rank is not known."""
    if value.shape is None:
        return None
    found: list[Dim] = []
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int):
            found.append(dim)
        elif not dim.value:
            found.append(unknown_size(value, axis))
        else:
            found.append(parse_dim(dim.value))
    return tuple(found)


def unknown_size(value: ir.Value, axis: int) -> Expr:
    """A symbol of its own for an axis whose size is not known."""
    return symbol(f"unknown_{value.name}_{axis}")


def to_shape(of: Sequence[Dim]) -> ir.Shape:
    """Dimensions as onnx-ir's shape, expressions as their text."""
    return ir.Shape([dim if isinstance(dim, int) else ir.SymbolicDim(str(dim)) for dim in of])


def set_type(value: ir.Value, dtype: ir.DataType | None, shape: Sequence[Dim] | None) -> None:
    """Record what is known of a value."""
    if dtype is not None:
        value.type = ir.TensorType(dtype)
    value.shape = None if shape is None else to_shape(shape)


def constant(value: ir.Value | None, limit: int = 1 << 16) -> npt.NDArray[Any] | None:
    """The numbers of an initializer or a Constant's output.

    None if it is not constant or has over `limit` elements.
    """
    tensor = constant_tensor(value)
    if tensor is None or tensor.size > limit:
        return None
    return tensor.numpy()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or a Constant's output, unread; None if not constant."""
    if value is None:
        return None
    if value.const_value is not None:
        # An initializer that is an input as well is a default that callers may override.
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain != "":
        return None
    tensor = node.attributes.get("value")
    if tensor is not None:
        # `Attr.as_tensor`, which get_const_tensor asks, checks a protocol for 30 us each time.
        return tensor.value
    if "sparse_value" in node.attributes:
        return None  # onnx-ir has no dense form of it
    return ir.convenience.get_const_tensor(value)


def tensor_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a tensor, which is all numbers."""
    return tuple(dim for dim in tensor.shape if isinstance(dim, int))


def known(value: ir.Value | None) -> Symbolic | None:
    """The symbolic value of a small integer or boolean tensor, if all of its elements are known."""
    if value is None:
        return None
    tensor = constant_tensor(value)
    if tensor is None:
        return facts_of(value).get(KNOWN)
    # Read anew each time: a pass may give an initializer another tensor.
    if tensor.dtype not in INTEGERS or tensor.size > MAX_TRACKED:
        return None
    array = tensor.numpy()
    return as_symbolic(array.ravel().tolist(), array.shape)


def facts_of(value: ir.Value) -> dict[str, Any]:
    """What inference keeps at a value, by key."""
    return cast("dict[str, Any]", value.meta)


def as_symbolic(elements: Sequence[object], shape: tuple[int, ...]) -> Symbolic:
    """An object array that numpy does not try to look into."""
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def known_ints(value: ir.Value | None) -> list[int] | None:
    """The elements of a small integer tensor, if all of them are plain numbers."""
    array = known(value)
    if array is None or any(isinstance(element, Expr) for element in array.ravel()):
        return None
    return [int(element) for element in array.ravel()]


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's value, or the default where the node does not have it.

    Raises:
        InputError: The value is no number, or no text, and the default is one.
    """
    found = node.attributes.get(name)
    if found is None:
        return default
    value = found.value
    for kind in (str, (int, float)):
        # ONNX's own operators were held against their schemas on reading; others have none.
        if isinstance(default, kind) and not isinstance(value, kind):
            raise InputError(
                f"attribute {name} of {describe(node)} is of type {found.type.name}",
                f"it must be as {default!r} is",
                "Export the model again, or mend the file",
            )
    return value
