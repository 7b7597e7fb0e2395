"""Type and shape inference, which runs behind the parser (hicann/ge:compiler/graph/preprocess).

The parser's graph is not run through GE here: `omforge.lowering.ge_inference` says what GE's
inference would refuse, and this file in which words.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from omforge import ir
from omforge.atc.sim import tensors
from omforge.atc.sim.reports import Refused, Report
from omforge.ir.infer import infer_model
from omforge.lowering.ge_inference import GeInference
from omforge.lowering.plugins import plugin_facts, plugin_node
from omforge.lowering.value_bounds import one_hot_may_wrap, sign_of_mod_differs


def load_graph(path: Path) -> ir.Model:
    """The model as atc has it: inputs with an initializer are constants, bytes too many unread.

    Attributes without a type are not there.

    Raises:
        InputError: It cannot be read.
        ValueError: onnx-ir cannot make a graph of it.
    """
    message = ir.read_message(path)
    constants = {tensor.name: tensor for tensor in message.graph.initializer}
    for value in [*message.graph.input]:
        if value.name in constants:
            message.graph.input.remove(value)
    for tensor in constants.values():
        size = tensors.size_in_bytes(tensor.data_type, tuple(tensor.dims))
        if 0 < size < len(tensor.raw_data):
            tensor.raw_data = tensor.raw_data[:size]
    for node in message.graph.node:
        for attribute in [*node.attribute]:
            if attribute.type == onnx.AttributeProto.UNDEFINED:
                node.attribute.remove(attribute)  # no plugin takes it for one
    try:
        model = ir.from_proto(message)
    except Exception as error:  # any fault of a foreign file may come out here, as anything
        raise ValueError(f"{type(error).__name__}: {error}") from error
    folder = str(Path(os.path.abspath(path)).parent)
    for _, tensor in ir.all_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = folder
    return model


def check_inference(path: Path, report: Report) -> None:
    """Infer types and shapes.

    Raises:
        Refused: GE stops at a node.
    """
    if report.errors:
        return  # a graph that is broken already; the parser's words are enough
    try:
        model = load_graph(path)
        model.graph.sort()
        infer_model(model)
    except (ir.OmforgeError, ValueError, TypeError, onnx.checker.ValidationError):
        return  # what follows says so
    opset = model.opset_imports.get("", 0)
    for node in model.graph.all_nodes():
        _check_values(node, opset, report)
    static = all(
        value.shape is not None and value.shape.is_static() for value in model.graph.inputs
    )
    for found in GeInference(model, opset).misfits():
        place = f"{found.node.name} ({found.node.op_type})"
        text = f"{place}: {found.what}: {found.why}."
        if found.kind == "sizes" and static:
            report.trap("SIM054", f"{text} The graph becomes one of dynamic shape.")
        elif found.kind == "output":
            report.note("SIM055", text)
        elif found.kind in ("shapes", "dtypes"):
            text = f"Call InferShapeAndType for node:{place} failed: {found.what}: {found.why}."
            report.inner(text, "EZ9999" if found.kind == "shapes" else "E89999")
            raise Refused


def _check_values(node: ir.Node, opset: int, report: Report) -> None:
    if sign_of_mod_differs(node):
        report.trap(
            "SIM024",
            f"{node.name} (Mod): fmod is dropped, and GE's Mod has the dividend's sign: of "
            "negative integers the result is another (math/mod/op_graph/mod_proto.h).",
        )
    if one_hot_may_wrap(node):
        report.note("SIM056", f"{node.name} (OneHot): an index at or above depth wraps around.")
    facts = [f for f in plugin_facts(node.op_type, opset) if f.kind in ("ignores", "changes")]
    seen = plugin_node(node) if facts else None
    for fact in facts:
        if seen is not None and fact.broken_by(seen):
            place = f"{node.name} ({node.op_type})"
            report.trap("SIM024", f"{place}: {fact.told(seen)}: {fact.why} ({fact.source}).")
