"""Rules for attributes: what plugins need, refuse and drop (`data/onnx_plugins.tsv`)."""

from __future__ import annotations

from collections.abc import Iterator

from omforge import ir
from omforge.lowering.facts import row_key
from omforge.lowering.legality.subject import Finding, Rule, Subject
from omforge.lowering.plugins import Kind, PluginFact, PluginNode, plugin_facts, plugin_node
from omforge.lowering.target import DEFAULT_DOMAIN, Target


def needed(subject: Subject) -> Iterator[Finding]:
    """A node has the attributes without which its plugin fails."""
    yield from _broken(subject, "needs")


def refused(subject: Subject) -> Iterator[Finding]:
    """No attribute has a value that the plugin refuses."""
    yield from _broken(subject, "refuses")


def ignored(subject: Subject) -> Iterator[Finding]:
    """What a plugin drops without a word changes nothing."""
    yield from _broken(subject, "ignores")


def changed(subject: Subject) -> Iterator[Finding]:
    """A plugin does what ONNX says of the node's attributes."""
    yield from _broken(subject, "changes")


def _broken(subject: Subject, kind: Kind) -> Iterator[Finding]:
    for node in subject.nodes:
        if node.domain not in ("", DEFAULT_DOMAIN, "npu") or subject.plugin(node) is None:
            continue
        facts = [fact for fact in plugin_facts(node.op_type, subject.opset) if fact.kind == kind]
        seen = plugin_node(node) if facts else None
        for fact in facts:
            if seen is not None and fact.broken_by(seen):
                yield _finding(node, fact, seen, subject.target)


def _finding(node: ir.Node, fact: PluginFact, seen: PluginNode, target: Target) -> Finding:
    told, why, remedy, level = fact.told(seen), fact.why, fact.remedy, None
    key = row_key(fact.op, f"{fact.kind} {fact.attribute}")
    verdict = target.facts.of("plugin", key) if fact.certainty == "inferred" else None
    if verdict is not None:
        why = f"{why}; {verdict.words}"
        level = None if verdict.holds else "advice"
    return Finding(ir.describe(node), told, why, remedy, fact.atc, level, fact.source)


_PLUGINS = "the plugins' sources (*_onnx_plugin.cpp), see onnx_plugins.tsv"

RULES = (
    Rule("plugin-needs", "EZ9999 of the plugin", _PLUGINS, needed),
    Rule("plugin-refuses", "EZ9999 of the plugin", _PLUGINS, refused),
    Rule("plugin-ignores", "wrong numbers without a word", _PLUGINS, ignored),
    Rule("plugin-changes", "wrong numbers without a word", _PLUGINS, changed),
)
