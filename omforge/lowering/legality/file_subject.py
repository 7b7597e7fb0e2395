"""An .onnx file as atc's parser reads it: the protobuf message, without its external weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import onnx

from omforge import ir


class StoredTensor(NamedTuple):
    """A constant as the file stores it: its place in words, and whether it is in the root graph."""

    where: str
    tensor: onnx.TensorProto
    in_root: bool

    @property
    def external(self) -> bool:
        """Whether its bytes are in another file."""
        return self.tensor.data_location == onnx.TensorProto.EXTERNAL


@dataclass(frozen=True)
class FileSubject:
    """A model file under check.

    Attributes:
        path: The file, as it was named.
        size: Its bytes.
        proto: The message; empty where the file is too large for one.
    """

    path: Path
    size: int
    proto: onnx.ModelProto

    @functools.cached_property
    def graphs(self) -> tuple[onnx.GraphProto, ...]:
        """The root graph, and the graphs inside its nodes."""
        return tuple(_graphs(self.proto.graph))

    @functools.cached_property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Initializers, and the tensors in attributes: the `value` of Constant nodes."""
        return tuple(_tensors(self.graphs))


def _tensors(graphs: Sequence[onnx.GraphProto]) -> Iterator[StoredTensor]:
    for graph in graphs:
        in_root = graph is graphs[0]
        for tensor in graph.initializer:
            yield StoredTensor(f"initializer {tensor.name}", tensor, in_root)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    yield StoredTensor(describe(node), attribute.t, in_root)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner: Sequence[onnx.GraphProto] = (*attribute.graphs,)
            if attribute.HasField("g"):
                inner = (attribute.g, *inner)
            for body in inner:
                yield from _graphs(body)


def describe(node: onnx.NodeProto) -> str:
    """Return the words that name a node, as `omforge.ir.describe` does for a loaded one."""
    made = [ir.Value(name=name) for name in node.output]
    metadata = {entry.key: entry.value for entry in node.metadata_props}
    loaded = ir.Node(
        node.domain, node.op_type, [], outputs=made, name=node.name, metadata_props=metadata
    )
    return ir.describe(loaded)
