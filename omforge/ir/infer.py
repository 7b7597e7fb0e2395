"""Shape inference on symbolic dimensions, with the integer values that shapes are made of.

Types and shapes are derived from graph inputs and initializers alone: what the exporter wrote in
`value_info` is never read (dynamo's is sometimes wrong after a rewrite, TorchScript's is absent).
Integer and boolean tensors of at most `MAX_TRACKED` elements carry their *symbolic* value as well,
so that `Shape -> Gather -> Mul -> Concat -> Reshape` gives a reshape whose target is known as an
expression, whatever the exporter's spelling.

onnx's own inference has no symbolic arithmetic (past + seq becomes unknown) and copies the model
through protobuf; the rules are in `infer_rules`, and an op without a rule there falls back to its
ONNX schema's own function.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from omforge.ir.diagnostics import describe
from omforge.ir.dims import Dim, Expr, parse_dim, symbol
from omforge.ir.errors import InputError
from omforge.ir.ops import TARGET_OPS, is_target_op

log = logging.getLogger(__name__)

MAX_TRACKED = 256
"""Integer tensors up to this many elements carry their symbolic value."""

Dims = tuple[Dim, ...]
Symbolic = npt.NDArray[np.object_]
"""An array of `Dim` or bool."""

Rule = Callable[["Inference"], None]

_KNOWN = "omforge.known"
_INTEGERS = {
    ir.DataType.INT64,
    ir.DataType.INT32,
    ir.DataType.BOOL,
    ir.DataType.UINT8,
    ir.DataType.INT8,
}
_SIZES = {ir.DataType.INT64, ir.DataType.INT32}
"""What holds a size of a tensor; in the narrower ones it might wrap around."""

_LATEST_OPSET = 24


def dims(value: ir.Value) -> Dims | None:
    """The dimensions of a value as numbers and expressions, or None where the rank is not known."""
    if value.shape is None:
        return None
    found: list[Dim] = []
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int):
            found.append(dim)
        elif not dim.value:
            found.append(_unknown(value, axis))
        else:
            found.append(parse_dim(dim.value))
    return tuple(found)


def _unknown(value: ir.Value, axis: int) -> Expr:
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
        return _facts(value).get(_KNOWN)
    # Read anew each time: a pass may give an initializer another tensor.
    if tensor.dtype not in _INTEGERS or tensor.size > MAX_TRACKED:
        return None
    array = tensor.numpy()
    return as_symbolic(array.ravel().tolist(), array.shape)


def _facts(value: ir.Value) -> dict[str, Any]:
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


class Inference:
    """One node under inference: what a rule reads and writes.

    Attributes:
        node: The node.
        imports: Opset version by domain.
        opset: The version of the node's own domain.
    """

    def __init__(self, node: ir.Node, imports: Mapping[str, int]) -> None:
        self.node = node
        self.imports = imports
        default = imports.get("", imports.get("ai.onnx", _LATEST_OPSET))
        self.opset = default if node.domain in ("", "ai.onnx") else imports.get(node.domain, 1)

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
        return _unknown(self.node.outputs[index], axis)

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
        _facts(output).pop(_KNOWN, None)
        if value is not None and dtype is not None and _holds(dtype, value):
            _facts(output)[_KNOWN] = value


def _holds(dtype: ir.DataType, value: Symbolic) -> bool:
    """Whether the dtype is one of those tracked, and holds the elements without wrapping around."""
    if dtype not in _INTEGERS or value.size > MAX_TRACKED:
        return False
    if dtype == ir.DataType.BOOL:
        return all(isinstance(element, bool) for element in value.ravel())
    limits = np.iinfo(dtype.numpy())
    return all(
        dtype in _SIZES if isinstance(element, Expr) else limits.min <= element <= limits.max
        for element in value.ravel()
    )


def infer_model(model: ir.Model) -> None:
    """Derive dtype, shape and symbolic values of every value from inputs and initializers.

    What an op that nobody knows returns keeps its dtype, and its shape too if it is a graph output.
    """
    declared = {id(output): dims(output) for output in model.graph.outputs}
    infer_graph(model.graph, model.graph.opset_imports)
    for output in model.graph.outputs:
        if output.shape is None and (shape := declared[id(output)]) is not None:
            output.shape = to_shape(shape)


def infer_graph(graph: ir.Graph, imports: Mapping[str, int]) -> None:
    """Derive all values of one graph, and of the graphs inside its nodes, afresh."""
    for value in graph.initializers.values():
        if value.const_value is not None:
            value.type = ir.TensorType(value.const_value.dtype)
            value.shape = ir.Shape(tensor_shape(value.const_value))
    for node in graph:
        for output in node.outputs:
            output.shape = None
            _facts(output).pop(_KNOWN, None)
    infer_nodes(graph, imports)


def infer_nodes(nodes: Iterable[ir.Node], imports: Mapping[str, int] | None = None) -> None:
    """Derive the outputs of `nodes`, which are in topological order, from their inputs.

    Args:
        nodes: What to infer.
        imports: Opset version by domain; by default what each node's own graph imports.
    """
    from omforge.ir.infer_rules import RULES  # which imports this module

    for node in nodes:
        given = imports
        if given is None:
            given = node.graph.opset_imports if node.graph is not None else {}
        context = Inference(node, given)
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None or any(_is_no_tensor(value) for value in node.inputs):
            rule = _target_op if is_target_op(node) else _fallback
        try:
            rule(context)
        except (ArithmeticError, IndexError, TypeError, ValueError) as error:
            # The node contradicts its operator. Inference describes; saying so is the verifier's.
            log.warning("no shape for %s %s: %s", node.op_type, node.name, error)
            for index, output in enumerate(node.outputs):
                context.out(output.dtype, None, index)


def _is_no_tensor(value: ir.Value | None) -> bool:
    """Whether it is a sequence or an optional, which the rules do not speak of."""
    return (
        value is not None and value.type is not None and not isinstance(value.type, ir.TensorType)
    )


def _target_op(context: Inference) -> None:
    """What the table of target ops says."""
    given: list[tuple[ir.DataType, Dims]] = []
    for value in context.node.inputs:
        shape = None if value is None else dims(value)
        if value is None or value.dtype is None or shape is None:
            return
        given.append((value.dtype, shape))
    for index, (dtype, shape) in enumerate(TARGET_OPS[context.node.op_type].infer(given)):
        context.out(dtype, shape, index)


def _fallback(context: Inference) -> None:
    """What the op's ONNX schema infers from the input types, for an op without a rule of ours."""
    node = context.node
    if any(
        a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for a in node.attributes.values()
    ):
        return
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for value in node.inputs:
        if value is None:
            continue
        if value.dtype is not None:
            types[value.name or ""] = ir.to_proto(value).type
        array = constant(value, limit=MAX_TRACKED)
        if array is not None and array.dtype.kind in "iufb":
            data[value.name or ""] = onnx.numpy_helper.from_array(array)
    imports = [
        onnx.OperatorSetIdProto(domain=domain, version=version)
        for domain, version in context.imports.items()
    ]
    try:
        schema = onnx.defs.get_schema(node.op_type, context.opset, node.domain)
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, ir.to_proto(node), types, data, opset_imports=imports
        )
    except (  # LookupError: an input without a type; ValidationError: one that the operator has not
        onnx.shape_inference.InferenceError,
        onnx.defs.SchemaError,
        onnx.checker.ValidationError,
        LookupError,
        RuntimeError,
    ) as error:
        log.debug("no shape for %s %s: %s", node.op_type, node.name, error)
        return
    for output in node.outputs:
        found = inferred.get(output.name or "")
        if found is None:
            continue
        output.type = ir.serde.deserialize_type_proto_for_type(found)
        output.shape = ir.serde.deserialize_type_proto_for_shape(found)
        _facts(output).pop(_KNOWN, None)
