"""Rules for attributes as the message has them: their types, and that each is given once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import onnx

from omforge.ir.ops import TARGET_OPS
from omforge.lowering.legality.file_subject import FileSubject, describe
from omforge.lowering.legality.subject import Finding, Rule
from omforge.lowering.plugins import attribute_types, plugin_facts
from omforge.lowering.target import DEFAULT_DOMAIN

_UNTYPED = onnx.AttributeProto.UNDEFINED
_DEFAULT = ("", DEFAULT_DOMAIN)

# Of these the rules for a loaded model speak: target_op_attributes, flash_attributes.
JUDGED_LOADED = frozenset((*TARGET_OPS, "NPUPromptFlashAttention"))


def attributes_once(subject: FileSubject) -> Iterator[Finding]:
    """A node has each attribute once."""
    for node in _nodes(subject):
        counts = Counter(attribute.name for attribute in node.attribute)
        for name, count in counts.items():
            if count > 1:
                yield Finding(
                    describe(node),
                    f"{node.op_type} has {name} {count} times",
                    "plugins go through all attributes: some take the first, some the last, some "
                    "both as one list",
                    "keep one of them",
                )


def attributes_are_typed(subject: FileSubject) -> Iterator[Finding]:
    """An attribute has the type that ONNX says, or for ATC's own operators the plugin."""
    versions = {
        entry.domain or DEFAULT_DOMAIN: entry.version for entry in subject.proto.opset_import
    }
    for node in _nodes(subject):
        opset = versions.get(node.domain or DEFAULT_DOMAIN, 0)
        known = _types(node, opset)
        for attribute in node.attribute:
            given = onnx.AttributeProto.AttributeType.Name(attribute.type)
            wanted = known.get(attribute.name)
            if attribute.type == _UNTYPED:
                what = f"{node.op_type} with {attribute.name} without a type"
            elif wanted and given != wanted:
                what = f"{node.op_type} with {attribute.name} as {given}"
            else:
                continue
            yield Finding(
                describe(node),
                what,
                f"the plugin reads it as {wanted}: of another type it is ignored, or 0"
                if wanted
                else "the plugin takes it for none",
                f"write it as {wanted}" if wanted else "give it a type",
            )


def own_attributes_are_read(subject: FileSubject) -> Iterator[Finding]:
    """An operator of ATC's own has no attribute that its plugin does not read."""
    versions = {
        entry.domain or DEFAULT_DOMAIN: entry.version for entry in subject.proto.opset_import
    }
    for node in _nodes(subject):
        if node.op_type in JUDGED_LOADED:
            continue
        for fact in plugin_facts(node.op_type, versions.get(node.domain or DEFAULT_DOMAIN, 0)):
            if fact.kind != "reads":
                continue
            known = {each.partition(":")[0] for each in fact.attribute.split(",")}
            for attribute in node.attribute:
                if attribute.name not in known:
                    yield Finding(
                        describe(node),
                        f"{node.op_type} with {attribute.name}",
                        f"the plugin reads {', '.join(sorted(known - {''})) or 'no attributes'}",
                        fact.remedy,
                        source=fact.source,
                    )


def _types(node: onnx.NodeProto, opset: int) -> Mapping[str, str]:
    if node.domain not in (*_DEFAULT, "npu") or node.op_type in JUDGED_LOADED:
        return {}
    return attribute_types(node.op_type, opset)


def _nodes(subject: FileSubject) -> Iterator[onnx.NodeProto]:
    for graph in subject.graphs:
        yield from graph.node


_PLUGINS = "the plugins' sources (*_onnx_plugin.cpp), see onnx_plugins.tsv"

RULES: tuple[Rule[FileSubject], ...] = (
    Rule("attributes-once", "another value, without a word", _PLUGINS, attributes_once, "seen"),
    Rule("attribute-types", "the default, without a word", _PLUGINS, attributes_are_typed, "seen"),
    Rule("own-attributes", "the default, without a word", _PLUGINS, own_attributes_are_read),
)
