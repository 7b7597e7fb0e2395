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
from collections.abc import Iterable, Mapping

import onnx
import onnx_ir as ir

from omforge.ir.infer_rules import RULES
from omforge.ir.inference import Inference
from omforge.ir.ops import TARGET_OPS, is_target_op
from omforge.ir.values import (
    KNOWN,
    MAX_TRACKED,
    Dims,
    constant,
    dims,
    facts_of,
    tensor_shape,
    to_shape,
)

log = logging.getLogger(__name__)


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
            facts_of(output).pop(KNOWN, None)
    infer_nodes(graph, imports)


def infer_nodes(nodes: Iterable[ir.Node], imports: Mapping[str, int] | None = None) -> None:
    """Derive the outputs of `nodes`, which are in topological order, from their inputs.

    Args:
        nodes: What to infer.
        imports: Opset version by domain; by default what each node's own graph imports.
    """
    for node in nodes:
        given = imports
        if given is None:
            given = node.graph.opset_imports if node.graph is not None else {}
        context = Inference(node, given, infer_graph)
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
        if value is None:  # an optional one
            given.append((ir.DataType.UNDEFINED, ()))
            continue
        shape = dims(value)
        if value.dtype is None or shape is None:
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
        facts_of(output).pop(KNOWN, None)
