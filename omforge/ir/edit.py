"""Edits that keep a graph whole: replace a value, remove what nobody uses, name what is new."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def replace_value(old: ir.Value, new: ir.Value) -> bool:
    """Let every use of `old` use `new`, a graph output keeping its name; False if that cannot be.

    It cannot be where `old` is a graph output and either is a graph input, or `new` is already an
    output or an initializer: an input or an output would lose its name.
    """
    if old.is_graph_output():
        if new.is_graph_output() or new.is_initializer():
            return False
        if new.is_graph_input() or old.is_graph_input():
            return False
        assert isinstance(old.graph, ir.Graph)
        name = old.name
        old.name = fresh_name(old.graph, f"{name}_before")
        new.name = name
        new.type = new.type or old.type  # an output must have one
        new.shape = old.shape if new.shape is None else new.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    return True


def take_name(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Give a value a name; what else bears it gets another."""
    for other in list(all_values(graph)):
        if other.name == name and other is not value:
            other.name = fresh_name(graph, f"{name}_exported")
    value.name = name


def remove_dead(model: ir.Model) -> int:
    """Remove nodes and initializers that no output depends on; the number of nodes removed.

    onnx-ir's own pass also empties the names of unused optional outputs, and ONNX Runtime's
    `Attention` wants its presents wherever it has pasts.
    """
    graph = model.graph
    count = 0
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
            count += 1
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]
    return count


def fresh_name(graph: ir.Graph, stem: str, taken: set[str] | None = None) -> str:
    """`stem`, or `stem_1`, `stem_2` …: the first that no value of the graph bears.

    Args:
        graph: Where the name shall be new.
        stem: What it starts with.
        taken: All names of the graph, for a caller that names many values; the new one is added to
            it.
    """
    if taken is None:
        taken = value_names(graph)
    name, count = stem, 0
    while name in taken:
        count += 1
        name = f"{stem}_{count}"
    taken.add(name)
    return name


def value_names(graph: ir.Graph) -> set[str]:
    """The names of all values of the graph and of the graphs inside its nodes."""
    graphs = (graph, *graph.subgraphs())
    return {value.name for inner in graphs for value in all_values(inner) if value.name}


def all_values(graph: ir.Graph) -> Iterable[ir.Value]:
    """Inputs, initializers and node outputs of the graph."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def add_initializer(
    graph: ir.Graph, name: str, array: npt.NDArray[Any], taken: set[str] | None = None
) -> ir.Value:
    """A new initializer; its name is made unique (see `fresh_name` for `taken`)."""
    name = fresh_name(graph, name, taken)
    # Not np.ascontiguousarray, which makes one dimension of none.
    tensor = ir.Tensor(np.asarray(array, order="C"), name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    graph.register_initializer(value)
    return value
