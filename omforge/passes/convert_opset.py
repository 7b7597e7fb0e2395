"""Bring the default domain to one opset, so that every later pass knows one spelling of each op.

onnx's own converter copies the model through protobuf (it dies at 2 GiB) and onnxscript's starts at
opset 18, so neither serves an Optimum export of 13 to 17. An op whose signature only grew needs
nothing; one whose meaning or spelling changed has an adapter below; anything else is an error that
names the node. Opsets above the canonical one are in `newer_opsets`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from omforge import ir
from omforge.ir.edit import add_initializer, value_names
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, dims
from omforge.recognition.newer_opsets import NEWEST, convert
from omforge.rewriting.base import Pass
from omforge.rewriting.splice import Names

CANONICAL_OPSET = 24
"""The first opset with `Swish`, and with `Attention`'s corrected cache semantics."""

_CANONICAL_IR_VERSION = 11


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """Convert the default domain to opset `target`, from below, or from 25 to 28 to 24."""

    name: ClassVar[str] = "convert-opset"
    target: int = CANONICAL_OPSET

    def run(self, model: ir.Model) -> int:
        """Convert; the number of nodes that an adapter changed, at least 1 if the opset is another.

        Raises:
            InputError: The model is of a newer opset, or a node's op changed in a way that no
                adapter covers.
        """
        source = model.opset_imports.get("", model.opset_imports.get("ai.onnx", self.target))
        if source > self.target:
            return self._convert_back(model, source)
        _check_known(model, source)
        if source < _LAST_RANK_DEPENDENT <= self.target:
            infer_model(model)
        taken = value_names(model.graph)
        changed = sum(
            _convert(node, source, self.target, taken) for node in list(model.graph.all_nodes())
        )
        model.opset_imports.pop("ai.onnx", None)
        model.opset_imports[""] = self.target
        model.ir_version = max(model.ir_version, _CANONICAL_IR_VERSION)
        return max(changed, int(source != self.target))

    def _convert_back(self, model: ir.Model, source: int) -> int:
        """From an opset above the canonical one."""
        if source > NEWEST or self.target != CANONICAL_OPSET:
            raise ir.InputError(
                f"the model is of opset {source}",
                f"omforge reads opsets up to {NEWEST}, and writes them at {CANONICAL_OPSET}",
                f"Export with opset {CANONICAL_OPSET} or lower",
            )
        infer_model(model)
        names = Names(model)
        for node in list(model.graph.all_nodes()):
            if node.domain == "":
                convert(model, node, self.target, names)
        model.opset_imports.pop("ai.onnx", None)
        model.opset_imports[""] = self.target
        for node in model.graph.all_nodes():
            node.version = None
        return 1


def _check_known(model: ir.Model, source: int) -> None:
    """Raise InputError for an operator that is newer than the opset which the model declares.

    ONNX Runtime refuses such a file. torch.onnx leaves one when it cannot convert what it made.
    """
    for node in model.graph.all_nodes():
        if node.domain != "" or _exists(node.op_type, source):
            continue
        if onnx.defs.has(node.op_type, ""):
            raise ir.InputError(
                f"the model says that it is of opset {source}, and has {node.op_type}, which came "
                f"later ({node.name})",
                "the exporter failed to convert it to the opset that was asked for, and no runtime "
                "takes it",
                "Export it with opset 23, which torch.onnx writes without a conversion",
            )


def _exists(op_type: str, opset: int) -> bool:
    try:
        onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    return True


_LAST_RANK_DEPENDENT = 13
"""From this opset on no adapter needs to know the rank of an input."""

Adapter = Callable[[ir.Node, set[str]], None]
"""Rewrites a node; the set holds all names of the model, for new constants."""


def _convert(node: ir.Node, source: int, target: int, taken: set[str]) -> bool:
    if node.domain != "":
        return False
    node.version = None
    changed = False
    for version, adapter in _ADAPTERS.get(node.op_type, {}).items():
        if source < version <= target:
            adapter(node, taken)
            changed = True
    _check(node, source, target)
    return changed


def _check(node: ir.Node, source: int, target: int) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, target, "")
    except onnx.defs.SchemaError:
        return  # not an op of the standard: the verifier reports it with its own words
    refused = [name for name in node.attributes if name not in schema.attributes]
    changed_at = _CHANGED.get(node.op_type, 0)
    if schema.deprecated:
        why = f"the op is deprecated since opset {schema.since_version}"
    elif source < changed_at <= target:
        why = f"its meaning changed at opset {changed_at}"
    elif refused:
        why = f"attribute {refused[0]} is gone"
    elif len(node.inputs) > schema.max_input:
        why = f"it takes at most {schema.max_input} inputs"
    else:
        return
    raise ir.InputError(
        f"{node.op_type} {node.name} of opset {source} cannot be written at opset {target}",
        why,
        f"Export with opset {max(changed_at, 18)} or above",
    )


def _axes_to_input(node: ir.Node, taken: set[str]) -> None:
    """`axes` became an input: ReduceSum, Squeeze and Unsqueeze at 13, other reductions at 18."""
    axes = node.attributes.pop("axes", None)
    if axes is not None:
        _set_input(node, "axes", axes, taken)


def _split_to_input(node: ir.Node, taken: set[str]) -> None:
    sizes = node.attributes.pop("split", None)
    if sizes is not None:
        _set_input(node, "sizes", sizes, taken)


def _split_count(node: ir.Node, taken: set[str]) -> None:
    """Equal parts need their number from opset 18 on."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _last_axis(node: ir.Node, taken: set[str]) -> None:
    """Before 13 the default axis was 1, and the axes from it on were flattened."""
    axis = attribute(node, "axis", 1)
    shape = dims(node.inputs[0]) if node.inputs[0] is not None else None
    if axis != -1 and (shape is None or axis != len(shape) - 1):
        raise ir.InputError(
            f"{node.op_type} {node.name} flattens from axis {axis}",
            "which opset 13 and above cannot say in one op",
            "Export with opset 13 or above",
        )
    node.attributes["axis"] = ir.AttrInt64("axis", -1)


def _rename_scatter(node: ir.Node, taken: set[str]) -> None:
    node.op_type = "ScatterElements"


def _set_input(node: ir.Node, what: str, numbers: ir.Attr, taken: set[str]) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    array = np.array(numbers.as_ints(), dtype=np.int64)
    value = add_initializer(graph, f"{node.outputs[0].name}_{what}", array, taken)
    node.resize_inputs(max(len(node.inputs), 2))
    node.replace_input_with(1, value)


_REDUCTIONS = ("Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")

_ADAPTERS: Mapping[str, Mapping[int, Adapter]] = {
    **{f"Reduce{kind}": {18: _axes_to_input} for kind in _REDUCTIONS},
    "ReduceSum": {13: _axes_to_input},
    "Squeeze": {13: _axes_to_input},
    "Unsqueeze": {13: _axes_to_input},
    "Split": {13: _split_to_input, 18: _split_count},
    "Softmax": {13: _last_axis},
    "LogSoftmax": {13: _last_axis},
    "Hardmax": {13: _last_axis},
    "Scatter": {11: _rename_scatter},
}

# Changed in meaning or spelling, not used by language models: refused rather than guessed.
_CHANGED: Mapping[str, int] = {
    "BatchNormalization": 14,
    "Clip": 11,
    "Dropout": 12,
    "GridSample": 20,
    "GroupNormalization": 21,
    "Pad": 11,
    "Resize": 13,
    "RoiAlign": 16,
    "Scan": 9,
    "Slice": 10,
    "TopK": 10,
    "Upsample": 10,
}
