"""Preflight: what atc would say of any ONNX file, all of it at once.

The file is read as atc's parser reads it: its external weights are not loaded, its IR version does
not matter, and what no loader would take is reported, not raised, unless the file has to be whole.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from omforge import ir
from omforge.ir.files import require_whole
from omforge.ir.infer import infer_model
from omforge.ir.read_check import TYPED_FIELDS, tensor_faults
from omforge.lowering.legality import attribute_rules, file_rules, message_rules
from omforge.lowering.legality.file_rules import FILE_LIMIT
from omforge.lowering.legality.file_subject import FileSubject
from omforge.lowering.legality.interface_rules import REGISTERED_OPSETS
from omforge.lowering.legality.message_rules import raw_size
from omforge.lowering.legality.rules import RULES
from omforge.lowering.legality.subject import Offence, Rule, Subject, as_seen, judge, rule_seen
from omforge.lowering.legalize.dialect import OPSET
from omforge.lowering.plugins import attribute_types
from omforge.lowering.target import Target

log = logging.getLogger(__name__)

FILE_RULES: tuple[Rule[FileSubject], ...] = (
    *file_rules.RULES,
    *message_rules.RULES,
    *attribute_rules.RULES,
)
"""The rules that look at the file and the protobuf message."""

ALL_RULES: Mapping[str, Rule[FileSubject] | Rule[Subject]] = {
    rule.id: rule for rule in (*FILE_RULES, *RULES)
}

UNREADABLE = "unreadable-graph"
"""The code where a graph cannot be loaded, so that the rules for nodes were not applied."""


@dataclass(frozen=True)
class FileCheck:
    """What was found in one file.

    Attributes:
        path: The file.
        target: The SoC.
        nodes: How many nodes were looked at.
        offences: In the order of the rules, those of the file first.
    """

    path: Path
    target: Target
    nodes: int
    offences: tuple[Offence, ...]

    @property
    def errors(self) -> tuple[Offence, ...]:
        """What atc refuses or gets wrong."""
        return tuple(item for item in self.offences if item.level == "error")

    @property
    def advice(self) -> tuple[Offence, ...]:
        """What atc takes, and is better otherwise."""
        return tuple(item for item in self.offences if item.level == "advice")


def check_file(
    path: str | os.PathLike[str],
    target: Target,
    *,
    gears: bool = False,
    allow: Collection[str] = (),
    whole: bool = False,
) -> FileCheck:
    """Hold an ONNX file against atc.

    Args:
        path: Any .onnx file.
        target: The SoC that it is for.
        gears: Symbolic dims of the inputs are meant for atc's --dynamic_dims.
        allow: Rules that are inferred, by name: their offences become advice.
        whole: Refuse a damaged file as `ir.load` does, instead of saying what atc makes of it.

    Raises:
        InputError: The file is missing, truncated or no ONNX model, or `allow` names a rule that is
            not there or is no inference; or it is damaged and has to be whole.
    """
    require_allowable(allow, ALL_RULES, target)
    file = Path(path)
    size = file.stat().st_size if file.is_file() else 0
    too_large = size > FILE_LIMIT
    empty = file.is_file() and size == 0
    message = onnx.ModelProto() if too_large or empty else ir.read_message(file)
    subject = FileSubject(file, size, message)
    if whole and not (too_large or empty):
        require_whole(file, message)
    found = [offence for rule in FILE_RULES for offence in judge(rule, subject)]
    if not (too_large or empty):
        found += _judge_graph(subject, target, gears)
    nodes = sum(len(graph.node) for graph in subject.graphs)
    seen = (as_seen(item, target) for item in found)
    return FileCheck(file, target, nodes, tuple(allowed(item, allow) for item in seen))


def require_allowable(
    names: Collection[str], rules: Mapping[str, Rule[Any]], target: Target
) -> None:
    """Raise InputError unless each is the name of a rule that is inferred, and not seen to hold."""
    inferred = sorted(name for name, rule in rules.items() if rule.certainty == "inferred")
    for name in names:
        verdict = rule_seen(name, target) if name in inferred else None
        if verdict is not None and verdict.holds:
            raise ir.InputError(f"--allow {name}", verdict.words, "Change the model")
        if name in inferred:
            continue
        rule = rules.get(name)
        why = (
            f"it is {rule.certainty}, not inferred: {rule.source}"
            if rule is not None
            else "there is no such rule"
        )
        raise ir.InputError(f"--allow {name}", why, f"Rules that may be: {', '.join(inferred)}")


def allowed(offence: Offence, allow: Collection[str]) -> Offence:
    """Return an offence as it counts: as advice where its rule is among those allowed."""
    if offence.code not in allow or offence.level == "advice":
        return offence
    return dataclasses.replace(offence, level="advice", why=f"{offence.why}; allowed by --allow")


def _judge_graph(subject: FileSubject, target: Target, gears: bool) -> Iterator[Offence]:
    # In place: a copy would double a model with its weights inside. The message was judged before.
    _make_loadable(subject.proto)
    try:
        model = _load(subject.proto, subject.path)
    except Exception as error:  # any fault of a foreign file may come out here, as anything
        while error.__cause__ is not None:
            error = error.__cause__
        yield Offence(
            where="",
            what="the graph cannot be loaded",
            why=f"{type(error).__name__}: {error}; the rules for nodes were not applied",
            remedy="mend what the other lines name, or export the model again",
            code=UNREADABLE,
        )
        return
    try:
        infer_model(model)
    except Exception as error:  # shapes sharpen rules; a broken model is judged without them
        log.info("no shapes for %s: %s", subject.path, error)
    imports = model.opset_imports
    own = imports.get("", imports.get("ai.onnx", 0))
    opset = own if own in REGISTERED_OPSETS else OPSET
    judged = Subject(model, target, opset, gears=gears)
    for rule in RULES:
        yield from judge(rule, judged)


def _load(message: onnx.ModelProto, path: Path) -> ir.Model:
    model = ir.from_proto(message)
    folder = str(Path(os.path.abspath(path)).parent)
    for _, tensor in ir.all_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = folder
    return model


def _make_loadable(message: onnx.ModelProto) -> None:
    """Mend what message rules report and onnx-ir refuses, so that the rest is judged."""
    for entry in [*message.opset_import]:
        if entry.domain == "ai.onnx":
            entry.domain = ""
    graphs = FileSubject(Path(), 0, message).graphs
    known = onnx.TensorProto.DataType.values()
    versions = {entry.domain: entry.version for entry in message.opset_import}
    for stored in FileSubject(Path(), 0, message).tensors:
        tensor = stored.tensor
        if tensor.data_type not in known or tensor.data_type == onnx.TensorProto.UNDEFINED:
            tensor.data_type = onnx.TensorProto.UINT8
        _fit_data(tensor)
        for entry in [*tensor.external_data]:
            whole = entry.key in ("offset", "length") and entry.value.strip().isdecimal()
            if entry.key != "location" and not whole:
                tensor.external_data.remove(entry)
    for graph in graphs:
        made: set[str] = {value.name for value in graph.input}
        for node in graph.node:
            _keep_loadable_attributes(node, versions)
            for index, name in enumerate(node.output):
                if name and name in made:
                    node.output[index] = f"{name}.made_again.{index}"
                made.add(name)


_PADDED = 1 << 20


def _fit_data(tensor: onnx.TensorProto) -> None:
    """Give data the length that dims and dtype say: what is too long is not read by atc."""
    known = tensor.data_type not in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if not known or external or any(dim < 0 for dim in tensor.dims):
        return
    size = raw_size(tensor)
    if not tensor.HasField("raw_data"):
        if size <= _PADDED and any(tensor_faults("", tensor)):
            for name in TYPED_FIELDS:
                tensor.ClearField(name)
            tensor.raw_data = bytes(size)
    elif len(tensor.raw_data) > size:
        tensor.raw_data = tensor.raw_data[:size]
    elif len(tensor.raw_data) < size <= _PADDED:
        tensor.raw_data = tensor.raw_data.ljust(size, b"\0")


def _keep_loadable_attributes(node: onnx.NodeProto, versions: Mapping[str, int]) -> None:
    """Drop attributes of another type than is read, and all but the first of one name."""
    own = not onnx.defs.has(node.op_type)  # which have rules that look at the loaded node
    types = attribute_types(node.op_type, versions.get(node.domain, 0))
    names: set[str] = set()
    for attribute in [*node.attribute]:
        given = onnx.AttributeProto.AttributeType.Name(attribute.type)
        wanted = given if own else types.get(attribute.name, given)
        if attribute.name in names or wanted != given or (given == "UNDEFINED"):
            node.attribute.remove(attribute)
        names.add(attribute.name)
