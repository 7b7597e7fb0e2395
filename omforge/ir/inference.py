"""One node under inference: what a rule reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from omforge.ir.dims import Dim, Expr
from omforge.ir.values import (
    INTEGERS,
    KNOWN,
    MAX_TRACKED,
    Dims,
    Symbolic,
    as_symbolic,
    attribute,
    dims,
    facts_of,
    known,
    known_ints,
    set_type,
    unknown_size,
)

Rule = Callable[["Inference"], None]


_SIZES = {ir.DataType.INT64, ir.DataType.INT32}
"""What holds a size of a tensor; in the narrower ones it might wrap around."""


_LATEST_OPSET = 24


class Inference:
    """One node under inference: what a rule reads and writes.

    Attributes:
        node: The node.
        imports: Opset version by domain.
        opset: The version of the node's own domain.
    """

    def __init__(
        self,
        node: ir.Node,
        imports: Mapping[str, int],
        infer_graph: Callable[[ir.Graph, Mapping[str, int]], None],
    ) -> None:
        self.node = node
        self.imports = imports
        self._infer_graph = infer_graph
        default = imports.get("", imports.get("ai.onnx", _LATEST_OPSET))
        self.opset = default if node.domain in ("", "ai.onnx") else imports.get(node.domain, 1)

    def infer_graph(self, graph: ir.Graph) -> None:
        """Derive the values of a graph inside the node."""
        self._infer_graph(graph, self.imports)

    def input(self, index: int) -> ir.Value | None:
        """Input `index`, None where it is absent."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def dims(self, index: int = 0) -> Dims | None:
        """Dimensions of input `index`."""
        value = self.input(index)
        return None if value is None else dims(value)

    def dtype(self, index: int = 0) -> ir.DataType | None:
        """Dtype of input `index`."""
        value = self.input(index)
        return None if value is None else value.dtype

    def known(self, index: int = 0) -> Symbolic | None:
        """Symbolic value of input `index`."""
        return known(self.input(index))

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute of the node."""
        return attribute(self.node, name, default)

    def integers(self, name: str, index: int) -> Symbolic | None:
        """Integers given as an attribute (older opsets) or as an input whose value is known."""
        found = self.node.attributes.get(name)
        if found is None:
            return self.known(index)
        given = found.value
        elements = [given] if isinstance(given, int) else list(found.as_ints())
        return as_symbolic(elements, (len(elements),))

    def axes(self, name: str = "axes", index: int = 1) -> list[int] | None:
        """Axes given as an attribute (older opsets) or as a constant input."""
        found = self.node.attributes.get(name)
        if found is not None:
            return list(found.as_ints())
        return known_ints(self.input(index))

    def unknown(self, axis: int, index: int = 0) -> Expr:
        """A new symbol for one dimension of output `index`."""
        return unknown_size(self.node.outputs[index], axis)

    def unknowns(self, rank: Dim | None) -> Dims | None:
        """New symbols for all dimensions of output 0; None if the rank is no number."""
        return tuple(self.unknown(i) for i in range(rank)) if isinstance(rank, int) else None

    def length(self, index: int) -> Dim | None:
        """The length of the 1-D input `index`: the rank of what it describes."""
        shape = self.dims(index)
        return shape[0] if shape else None

    def out(
        self,
        dtype: ir.DataType | None,
        shape: Sequence[Dim] | None,
        index: int = 0,
        value: Symbolic | None = None,
    ) -> None:
        """Record dtype, shape and symbolic value of output `index`."""
        if index >= len(self.node.outputs):
            return
        output = self.node.outputs[index]
        set_type(output, dtype, shape)
        facts_of(output).pop(KNOWN, None)
        if value is not None and dtype is not None and _holds(dtype, value):
            facts_of(output)[KNOWN] = value


def _holds(dtype: ir.DataType, value: Symbolic) -> bool:
    """Whether the dtype is one of those tracked, and holds the elements without wrapping around."""
    if dtype not in INTEGERS or value.size > MAX_TRACKED:
        return False
    if dtype == ir.DataType.BOOL:
        return all(isinstance(element, bool) for element in value.ravel())
    limits = np.iinfo(dtype.numpy())
    return all(
        dtype in _SIZES if isinstance(element, Expr) else limits.min <= element <= limits.max
        for element in value.ravel()
    )
