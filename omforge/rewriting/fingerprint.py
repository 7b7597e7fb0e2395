"""Whether a pass changed a model, seen in the model itself and not in what the pass says.

The count that a pass returns is its author's word. A fingerprint is what an ONNX file of the model
would say, in O(nodes): names, edges, attributes, the interface, opsets, and each tensor. Tensors of
up to `SMALL` bytes count by their bytes. Larger ones count by the object, where an external one is
in its file, and by `SAMPLES` elements where they are an array that somebody may write into.
Dtypes and shapes between the nodes are notes that any pass may add, and do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omforge import ir

SMALL = 1 << 10
SAMPLES = 64

Entry = tuple[Any, ...]


@dataclass(frozen=True)
class Fingerprint:
    """A model as it was at one moment.

    Attributes:
        entries: Opsets, interfaces, initializers and nodes of each graph, in order. An entry begins
            with the words for what it is.
        alive: The tensors that entries name by identity, which another object must not take over.
    """

    entries: tuple[Entry, ...]
    alive: tuple[Any, ...]

    def difference(self, later: Fingerprint) -> str:
        """Name the first thing in which a later fingerprint is another; "" where nothing is."""
        for old, new in zip(self.entries, later.entries, strict=False):
            if old != new:
                return f"{new[0]}" if old[0] == new[0] else f"{new[0]}, where {old[0]} was"
        if len(self.entries) == len(later.entries):
            return ""
        more = len(later.entries) > len(self.entries)
        longer = later.entries if more else self.entries
        what = longer[min(len(self.entries), len(later.entries))][0]
        return f"{what} is new" if more else f"{what} is gone"


def fingerprint(model: ir.Model) -> Fingerprint:
    """Return the fingerprint of a model as it is now."""
    taken = _Taken()
    entries = tuple(taken.model(model))
    return Fingerprint(entries, tuple(taken.alive))


class _Taken:
    """One walk. Values are numbered as they are met: a name that two of them have hides neither."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.alive: list[Any] = []

    def model(self, model: ir.Model) -> Iterator[Entry]:
        yield ("the imported opsets", *sorted(model.graph.opset_imports.items()))
        yield from self._graph(model.graph)
        for function in model.functions.values():
            name = f"function {function.domain}.{function.name}"
            yield (name, function.overload, *sorted(function.opset_imports.items()))
            yield from self._graph(function.graph)

    def _graph(self, graph: ir.Graph) -> Iterator[Entry]:
        for value in graph.inputs:
            shape = None if value.shape is None else value.shape.dims
            yield (f"input {value.name}", self._number(value), value.dtype, shape)
        for name, value in graph.initializers.items():
            tensor = None if value.const_value is None else self._tensor(value.const_value)
            yield (f"initializer {name}", self._number(value), value.name, tensor)
        for node in graph:
            yield from self._node(node)
        for value in graph.outputs:
            yield (f"output {value.name}", self._number(value), value.dtype)

    def _node(self, node: ir.Node) -> Iterator[Entry]:
        inputs = tuple([None if v is None else self._number(v) for v in node.inputs])
        outputs = tuple([(self._number(v), v.name) for v in node.outputs])
        attributes: list[Any] = []
        inner: list[ir.Graph] = []
        for name, attribute in node.attributes.items():
            attributes.append((name, attribute.type, self._attribute(attribute, inner)))
        label = f"{node.op_type} {node.name or (node.outputs and node.outputs[0].name) or ''}"
        yield (label, node.domain, node.overload, node.version, inputs, outputs, *attributes)
        for graph in inner:
            yield from self._graph(graph)

    def _attribute(self, attribute: ir.Attr, inner: list[ir.Graph]) -> Any:
        if attribute.is_ref():
            return attribute.ref_attr_name
        value = attribute.value
        match attribute.type:
            case ir.AttributeType.TENSOR:
                return self._tensor(cast(ir.TensorProtocol, value))
            case ir.AttributeType.TENSORS:
                return tuple(map(self._tensor, cast("tuple[ir.TensorProtocol, ...]", value)))
            case ir.AttributeType.GRAPH:
                inner.append(attribute.as_graph())
                return None
            case ir.AttributeType.GRAPHS:
                inner += attribute.as_graphs()
                return len(attribute.as_graphs())
            case _:
                return value

    def _number(self, value: ir.Value) -> int:
        return self.numbers.setdefault(id(value), len(self.numbers))

    def _tensor(self, tensor: ir.TensorProtocol) -> Entry:
        size = tensor.nbytes
        what = (tensor.dtype, tuple(tensor.shape))
        if isinstance(tensor, ir.ExternalTensor):
            return (*what, tensor.path, tensor.offset)
        self.alive.append(tensor)
        if isinstance(tensor, ir.LazyTensor) or tensor.dtype is ir.DataType.STRING:
            return (*what, id(tensor))
        if size <= SMALL:
            return (*what, tensor.tobytes())
        held: Any = tensor.raw
        if not _is_plain_array(held):
            return (*what, id(tensor))
        flat: npt.NDArray[Any] = held.reshape(-1)
        return (*what, id(tensor), flat[:: -(-flat.size // SAMPLES)].tobytes(), flat[-1:].tobytes())


def _is_plain_array(held: Any) -> bool:
    return isinstance(held, np.ndarray) and held.flags.c_contiguous
