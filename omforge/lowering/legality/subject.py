"""What the rules look at, what they return, and what a rule is."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

from omforge import ir
from omforge.lowering.facts import Verdict
from omforge.lowering.ge_inference import GeInference, Misfit
from omforge.lowering.target import DEFAULT_DOMAIN, Target, registered

Certainty = Literal["seen", "source", "inferred"]
"""How a fact about atc is known: seen by running CANN's parser, read in a source or document, or
inferred from those. What is inferred is read the conservative way."""

Level = Literal["error", "advice"]
"""An error is refused or wrong; advice is about what atc takes and the dialect of omforge does not
(slow, unsafe with older releases, or in need of a flag)."""

S = TypeVar("S")

_CODE = re.compile(r"\b[EW][0-9A-Z]\d{4}\b")


class Finding(NamedTuple):
    """One offence: the place, the fault without the place, the reason, and what mends it.

    `atc`, `level` and `source` replace the rule's where one place differs from the others; an `atc`
    of "" is a fault that atc does not report.
    """

    where: str
    what: str
    why: str
    remedy: str
    atc: str | None = None
    level: Level | None = None
    source: str | None = None


@dataclass(frozen=True)
class Rule(Generic[S]):
    """One rule of ATC, or of the dialect that omforge lowers to.

    Attributes:
        id: A stable kebab-case name, the diagnostic's `code`.
        atc: What atc does with such a model: an error code, or what goes wrong silently.
        source: Where that was read, `repository:path`.
        check: Yields the offences.
        certainty: How it is known.
        level: Whether atc takes the model.
    """

    id: str
    atc: str
    source: str
    check: Callable[[S], Iterator[Finding]]
    certainty: Certainty = "source"
    level: Level = "error"

    @property
    def atc_code(self) -> str:
        """The code of atc's error, or "" where it reports none."""
        found = _CODE.search(self.atc)
        return found.group() if found else ""


@dataclass(frozen=True)
class Offence(ir.Diagnostic):
    """A diagnostic with what is known about the rule behind it.

    Attributes:
        atc: The code of the error that atc would report; "" where it reports none.
        source: Where the rule was read.
        certainty: How it is known.
        level: "error", or "advice", which fails no check of a foreign model.
    """

    atc: str = ""
    source: str = ""
    certainty: Certainty = "source"
    level: Level = "error"


def judge(rule: Rule[S], subject: S) -> Iterator[Offence]:
    """Apply one rule."""
    for finding in rule.check(subject):
        told = f"{finding.why}; " if finding.why else ""
        doubt = ", inferred" if rule.certainty == "inferred" else ""
        source = finding.source or rule.source
        yield Offence(
            where=finding.where,
            what=finding.what,
            why=f"{told}atc: {rule.atc} ({source}{doubt})",
            remedy=finding.remedy,
            code=rule.id,
            atc=rule.atc_code if finding.atc is None else finding.atc,
            source=source,
            certainty=rule.certainty,
            level=finding.level or rule.level,
        )


def as_seen(offence: Offence, target: Target) -> Offence:
    """Return an offence as it counts where the device has answered the rule's probe.

    A rule that was seen to hold is no inference any more; one that was seen not to is advice.
    """
    verdict = rule_seen(offence.code, target)
    if verdict is None or offence.certainty != "inferred":
        return offence
    level = offence.level if verdict.holds else "advice"
    why = f"{offence.why}; {verdict.words}"
    return dataclasses.replace(offence, level=level, why=why, certainty="seen")


def rule_seen(rule: str, target: Target) -> Verdict | None:
    """Whether a rule was seen to hold on a target; None where nothing was."""
    return target.facts.of("rule", rule)


@dataclass(frozen=True)
class Subject:
    """A model under check, with what several rules ask for.

    Attributes:
        model: The model.
        target: The SoC that it is for.
        opset: The default domain's opset at which operators are looked up.
        gears: Whether symbolic dims of the inputs stand for gears (atc's --dynamic_dims).
        dialect: Whether the model must be in the dialect that omforge lowers to, not only legal.
    """

    model: ir.Model
    target: Target
    opset: int
    gears: bool = False
    dialect: bool = False

    def plugin(self, node: ir.Node) -> str | None:
        """The GE type that atc maps this node to at its domain's opset, or None."""
        domain = node.domain or DEFAULT_DOMAIN
        if domain == DEFAULT_DOMAIN:
            return registered(domain, node.op_type, self.opset)
        version = self.graph.opset_imports.get(domain)
        return None if version is None else registered(domain, node.op_type, version)

    @property
    def graph(self) -> ir.Graph:
        """The root graph."""
        return self.model.graph

    @functools.cached_property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes, those of subgraphs included."""
        return tuple(self.graph.all_nodes())

    @functools.cached_property
    def misfits(self) -> tuple[Misfit, ...]:
        """What GE's inference finds."""
        return tuple(GeInference(self.model, self.opset).misfits())

    @functools.cached_property
    def inputs(self) -> tuple[ir.Value, ...]:
        """The graph inputs that are not initializers too: ATC takes those for constants."""
        return tuple(value for value in self.graph.inputs if not value.is_initializer())

    @functools.cached_property
    def constants(self) -> tuple[tuple[str, ir.TensorProtocol, bool], ...]:
        """Every constant: its place in words, the tensor, and whether it is in the root graph."""
        found: list[tuple[str, ir.TensorProtocol, bool]] = []
        for graph in (self.graph, *self.graph.subgraphs()):
            for name, value in graph.initializers.items():
                if value.const_value is not None:
                    found.append((f"initializer {name}", value.const_value, graph is self.graph))
        for node in self.nodes:
            attribute = node.attributes.get("value") if node.op_type == "Constant" else None
            if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
                found.append((ir.describe(node), attribute.as_tensor(), node.graph is self.graph))
        return tuple(found)

    @functools.cached_property
    def value_names(self) -> frozenset[str]:
        """The names of all tensors."""
        names = {value.name or "" for value in self.graph.inputs}
        names.update(self.graph.initializers)
        names.update(value.name or "" for node in self.nodes for value in node.outputs)
        return frozenset(names - {""})

    @functools.cached_property
    def node_names(self) -> Counter[str]:
        """How often each node name occurs."""
        return Counter(node.name or "" for node in self.nodes)

    def typed(self, *op_types: str) -> Iterator[ir.Node]:
        """The nodes of these op types in the default domain; ATC's own in domain `npu` too."""
        for node in self.nodes:
            if node.domain in ("", DEFAULT_DOMAIN):
                if node.op_type in op_types:
                    yield node
            elif node.domain == "npu" and {node.op_type, f"NPU{node.op_type}"} & set(op_types):
                yield node


def describe_input(value: ir.Value) -> str:
    """Return the words that name a graph input."""
    return f"graph input {value.name}"


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return a value's shape where all of it is known."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(value.shape.numpy())


def present_inputs(node: ir.Node) -> int:
    """Return how many leading inputs are connected."""
    count = 0
    for value in node.inputs:
        if value is None:
            break
        count += 1
    return count
