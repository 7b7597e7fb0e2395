"""What the rules look at, what they return, and what a rule is."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from omforge import ir
from omforge.lowering.target import Target


class Finding(NamedTuple):
    """One offence: the place, the fault without the place, the reason, and what mends it."""

    where: str
    what: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Rule:
    """One rule of the ATC dialect.

    Attributes:
        id: A stable kebab-case name, the diagnostic's `code`.
        atc: What atc does with such a model: an error code, or what goes wrong silently.
        source: Where that was read, `repository:path`.
        check: Yields the offences.
    """

    id: str
    atc: str
    source: str
    check: Callable[[Subject], Iterator[Finding]]


@dataclass(frozen=True)
class Subject:
    """A model under check, with what several rules ask for."""

    model: ir.Model
    target: Target
    opset: int

    @property
    def graph(self) -> ir.Graph:
        """The root graph."""
        return self.model.graph

    @functools.cached_property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes, those of subgraphs included."""
        return tuple(self.graph.all_nodes())

    @functools.cached_property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The graph inputs that are not initializers too: ATC takes those for constants."""
        return tuple(value for value in self.graph.inputs if not value.is_initializer())

    @functools.cached_property
    def constants(self) -> tuple[tuple[str, ir.TensorProtocol, bool], ...]:
        """Every constant: its place in words, the tensor, and whether it is in the root graph."""
        found: list[tuple[str, ir.TensorProtocol, bool]] = []
        for graph in (self.graph, *self.graph.subgraphs()):
            for name, value in graph.initializers.items():
                if value.const_value is not None:
                    found.append((f"initializer {name}", value.const_value, graph is self.graph))
        for node in self.nodes:
            attribute = node.attributes.get("value") if node.op_type == "Constant" else None
            if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
                found.append((ir.describe(node), attribute.as_tensor(), node.graph is self.graph))
        return tuple(found)

    @functools.cached_property
    def value_names(self) -> frozenset[str]:
        """The names of all tensors."""
        names = {value.name or "" for value in self.graph.inputs}
        names.update(self.graph.initializers)
        names.update(value.name or "" for node in self.nodes for value in node.outputs)
        return frozenset(names - {""})

    @functools.cached_property
    def node_names(self) -> Counter[str]:
        """How often each node name occurs."""
        return Counter(node.name or "" for node in self.nodes)

    def typed(self, *op_types: str) -> Iterator[ir.Node]:
        """The nodes of these op types in the default domain."""
        for node in self.nodes:
            if node.domain in ("", "ai.onnx") and node.op_type in op_types:
                yield node


def describe_input(value: ir.Value) -> str:
    """Return the words that name a graph input."""
    return f"graph input {value.name}"


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return a value's shape where all of it is known."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(value.shape.numpy())


def present_inputs(node: ir.Node) -> int:
    """Return how many leading inputs are connected."""
    count = 0
    for value in node.inputs:
        if value is None:
            break
        count += 1
    return count
