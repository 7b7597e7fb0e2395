"""A model as lines that are equal for models equal up to the names inside them."""

import hashlib
from typing import Any

import numpy as np

from omforge import ir
from omforge.ir.values import constant_tensor
from omforge.rewriting import schema

SMALL = 16


def outline(model: ir.Model) -> list[str]:
    """Return one line per input, node and output.

    Inputs and outputs have their names, other values numbers in order of appearance, and constants
    stand where they are used, by content. Attributes that have their default are left out.
    """
    graph = model.graph
    names = {value: str(value.name) for value in (*graph.inputs, *graph.outputs)}
    lines = [f"input {_typed(value)}" for value in graph.inputs]
    for node in graph:
        if node.op_type == "Constant":
            continue
        for value in node.outputs:
            names.setdefault(value, f"%{len(names)}")
        made = ", ".join(names[value] for value in node.outputs)
        inputs = ", ".join(_operand(value, names) for value in node.inputs)
        lines.append(f"{made} = {_operator(node)}{_attributes(node, model)}({inputs})")
    return lines + [f"output {_typed(value)}" for value in graph.outputs]


def _typed(value: ir.Value) -> str:
    return f"{value.name}: {value.dtype}{value.shape}"


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _operand(value: ir.Value | None, names: dict[ir.Value, str]) -> str:
    if value is None:
        return "-"
    tensor = constant_tensor(value)
    return _tensor(tensor) if tensor is not None else names.get(value, f"?{value.name}")


def _tensor(tensor: ir.TensorProtocol) -> str:
    kind = f"{tensor.dtype.name.lower()}{list(tensor.shape.numpy())}"
    if tensor.size > SMALL:
        return f"{kind}:{hashlib.sha256(tensor.tobytes()).hexdigest()[:12]}"
    array = np.asarray(tensor.numpy())
    return f"{kind}{{{', '.join(_text(element) for element in array.ravel().tolist())}}}"


def _attributes(node: ir.Node, model: ir.Model) -> str:
    opset = model.opset_imports.get(node.domain, schema.LATEST)
    defaults = schema.defaults(node.op_type, node.domain, opset)
    shown = [
        f"{name}={_text(attribute.value)}"
        for name, attribute in sorted(node.attributes.items())
        if name not in defaults or _text(attribute.value) != _text(defaults[name])
    ]
    return f"<{', '.join(shown)}>" if shown else ""


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
