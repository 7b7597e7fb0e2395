"""Shape inference on symbolic dimensions, with the integer values that shapes are made of.

Types and shapes are derived from graph inputs and initializers alone: what the exporter wrote in `value_info` is
never read (dynamo's is sometimes wrong after a rewrite, TorchScript's is absent). Integer and boolean tensors of at
most `MAX_TRACKED` elements carry their *symbolic* value as well, so that `Shape -> Gather -> Mul -> Concat ->
Reshape` gives a reshape whose target is known as an expression, whatever the exporter's spelling.

onnx's own inference has no symbolic arithmetic (past + seq becomes unknown) and copies the model through protobuf;
the rules are in `infer_rules`, and an op without a rule there falls back to its ONNX schema's own function.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from omforge.ir.dims import Dim, Expr, parse_dim, symbol

log = logging.getLogger(__name__)

MAX_TRACKED = 256
"""Integer tensors up to this many elements carry their symbolic value."""

Dims = tuple[Dim, ...]
Symbolic = npt.NDArray[np.object_]
"""An array of `Dim` or bool; `None` in place of an element that is not known."""

Rule = Callable[["Inference"], None]

_KNOWN = "omforge.known"
_INTEGERS = {
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
        elif dim.value is None:
            found.append(symbol(f"unknown_{value.name}_{axis}"))
        else:
            found.append(parse_dim(dim.value))
    return tuple(found)


def to_shape(of: Sequence[Dim]) -> ir.Shape:
    """Dimensions as onnx-ir's shape, expressions as their text."""
    return ir.Shape([dim if isinstance(dim, int) else ir.SymbolicDim(str(dim)) for dim in of])


def set_type(value: ir.Value, dtype: ir.DataType | None, shape: Sequence[Dim] | None) -> None:
    """Record what is known of a value."""
    if dtype is not None:
        value.type = ir.TensorType(dtype)
    value.shape = None if shape is None else to_shape(shape)


def constant(value: ir.Value | None, limit: int = 1 << 16) -> npt.NDArray[Any] | None:
    """The numbers of an initializer or a Constant's output; None if it is not constant or has over `limit` elements."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size > limit:
        return None
    return tensor.numpy()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or a Constant's output, unread; None if the value is not constant."""
    if value is None:
        return None
    if value.const_value is not None:
        # An initializer that is an input as well is a default that callers may override.
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is not None and node.op_type == "Constant" and node.domain == "":
        return ir.convenience.get_const_tensor(value)
    return None


def known(value: ir.Value | None) -> Symbolic | None:
    """The symbolic value of a small integer or boolean tensor, if all of its elements are known."""
    if value is None:
        return None
    if _KNOWN in value.meta:
        return value.meta[_KNOWN]
    tensor = constant_tensor(value)
    if tensor is None or tensor.dtype not in _INTEGERS or tensor.size > MAX_TRACKED:
        return None
    array = tensor.numpy()
    found = as_symbolic(array.ravel().tolist(), array.shape)
    value.meta[_KNOWN] = found
    return found


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
    """An attribute's value, or the default where the node does not have it."""
    found = node.attributes.get(name)
    return default if found is None else found.value


class Inference:
    """One node under inference: what a rule reads and writes."""

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.node = node
        self.opset = opset

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

    def axes(self, name: str = "axes", index: int = 1) -> list[int] | None:
        """Axes given as an attribute (older opsets) or as a constant input."""
        found = self.node.attributes.get(name)
        if found is not None:
            return list(found.as_ints())
        return known_ints(self.input(index))

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
        output.meta.pop(_KNOWN, None)
        if value is not None and value.size <= MAX_TRACKED and dtype in _INTEGERS:
            output.meta[_KNOWN] = value


def infer_model(model: ir.Model) -> None:
    """Derive dtype, shape and symbolic values of every value in the main graph from inputs and initializers."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.type = ir.TensorType(value.const_value.dtype)
            value.shape = value.const_value.shape  # type: ignore[assignment]
    declared = {id(output): dims(output) for output in model.graph.outputs}
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
            output.meta.pop(_KNOWN, None)
    infer_nodes(model.graph)
    for output in model.graph.outputs:  # an op that nobody knows still has the declared shape
        if output.shape is None and (shape := declared[id(output)]) is not None:
            output.shape = to_shape(shape)


def infer_nodes(nodes: Iterable[ir.Node]) -> None:
    """Derive the outputs of `nodes`, which are in topological order, from their inputs."""
    from omforge.ir.infer_rules import RULES

    for node in nodes:
        graph = node.graph
        imports = graph.opset_imports if graph is not None else {}
        context = Inference(node, imports.get("", 24))
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None:
            _fallback(context)
        else:
            rule(context)


def _fallback(context: Inference) -> None:
    """What the op's ONNX schema infers from the input types, for an op without a rule of ours."""
    node = context.node
    if any(
        a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for a in node.attributes.values()
    ):
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, context.opset, node.domain)
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for value in node.inputs:
            if value is None:
                continue
            if value.dtype is not None:
                types[value.name or ""] = ir.to_proto(value).type
            tensor = constant_tensor(value)
            if tensor is not None and tensor.size <= MAX_TRACKED:
                data[value.name or ""] = ir.to_proto(tensor)
        inferred = onnx.shape_inference.infer_node_outputs(schema, ir.to_proto(node), types, data)
    except (onnx.shape_inference.InferenceError, onnx.defs.SchemaError, RuntimeError) as error:
        log.debug("no shape for %s %s: %s", node.op_type, node.name, error)
        return
    for output in node.outputs:
        found = inferred.get(output.name or "")
        if found is None:
            continue
        described = ir.serde.deserialize_type_proto_for_type(found)
        output.type = described
        output.shape = ir.serde.deserialize_type_proto_for_shape(found)
