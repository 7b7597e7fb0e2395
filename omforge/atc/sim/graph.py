"""What the parser makes of a model: a graph of GE operators, and its interface."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx


@dataclass(frozen=True)
class Checked:
    """One operator in the pre-checking report; `causes` are (code, message)."""

    name: str
    type: str
    causes: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class GraphInput:
    """A Data operator; a dim that is not known is -1."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class GraphOutput:
    """One output of the model: `<node>:<index>:<tensor>`, with what the model says of its shape."""

    node: str
    index: int
    tensor: str
    dtype: str
    dims: tuple[int, ...]

    @property
    def name(self) -> str:
        """As the .om names it (hicann/ge:api/atc/omg.cc:CreateOutputNodesInfo)."""
        return f"{self.node}:{self.index}:{self.tensor}"


@dataclass(frozen=True)
class GeNode:
    """One GE operator; `inputs` are (node, output index), None where nothing is connected."""

    name: str
    type: str
    inputs: tuple[tuple[str, int] | None, ...]
    outputs: int


@dataclass
class Parsed:
    """A parsed model.

    Attributes:
        model: The protobuf, with node names filled in.
        nodes: In the parser's order: nodes, then inputs, then constants.
        tensors: Constants by name: those that stay in the .om, and those beside the model.
    """

    model: onnx.ModelProto
    nodes: list[GeNode] = field(default_factory=list[GeNode])
    inputs: list[GraphInput] = field(default_factory=list[GraphInput])
    outputs: list[GraphOutput] = field(default_factory=list[GraphOutput])
    tensors: dict[str, onnx.TensorProto] = field(default_factory=dict[str, onnx.TensorProto])
