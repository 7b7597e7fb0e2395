"""Rules for names: of nodes, tensors, inputs and outputs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from omforge import ir
from omforge.lowering.legality.subject import Finding, Rule, Subject
from omforge.lowering.target import EXPANDED

_SAFE_NAME = re.compile(r"[A-Za-z0-9_./:-]+")
_NAMES = "names of nodes and tensors use A-Z a-z 0-9 _ . / : - only"
_LEGALIZE = "make the graph by `omforge compile`"
_NAME = "rename the node; `omforge compile` gives every node a name of its own"
_NAME_LIMIT = 127

NET_OUTPUT = "Node_Output"
"""The name of the node that gathers the outputs of a graph."""

# What a plugin's subgraph is named by, where it has more than one node that is no Data.
_PART = re.compile(r"PartitionedCall_(?P<part>.+)_[0-9]+")


def node_names_are_unique(subject: Subject) -> Iterator[Finding]:
    """Names are unique among the nodes of one graph, those included that the parser adds."""
    # A branch is a graph of its own, whose nodes get its name as a prefix (GenUniqueNodeName).
    for graph in (subject.graph, *subject.graph.subgraphs()):
        yield from _repeated_names(subject, graph)


def _repeated_names(subject: Subject, graph: ir.Graph) -> Iterator[Finding]:
    nodes = list(graph)
    names = Counter(node.name or "" for node in nodes)
    inputs = {value.name for value in graph.inputs if not value.is_initializer()}
    if graph is not subject.graph:
        # What a branch reads from outside becomes an input of it.
        values = (value for node in nodes for value in node.inputs if value is not None)
        inputs |= {value.name for value in values if _is_outer(value, graph)}
    # As the parser counts: nodes without a name in their order, initializers by name.
    nameless = (node for node in subject.nodes if not node.name)
    unnamed = {(node.op_type, index) for index, node in enumerate(nameless)}
    types = {op_type for op_type, _ in unnamed}
    constants = {f"{name}_Initializer": at for at, name in enumerate(sorted(graph.initializers))}
    for node in nodes:
        name = node.name
        if not name:
            continue
        automatic, _, number = name.rpartition("_")
        if names[name] > 1:
            yield Finding(ir.describe(node), "the node's name is used twice", "", _NAME)
        elif name in inputs:
            yield Finding(
                ir.describe(node),
                "the node has the name of a graph input",
                "each graph input becomes a node of that name",
                _NAME,
            )
        elif number.isdigit() and automatic in types:
            yield Finding(
                ir.describe(node),
                "the node has a name that the parser may give",
                f"a {automatic} node without a name is named {automatic}_<n>",
                _NAME,
                level=None if (automatic, int(number)) in unnamed else "advice",
            )
        elif number.isdigit() and automatic in constants:
            yield Finding(
                ir.describe(node),
                "the node has a name that the parser may give",
                "an initializer becomes a node named <name>_Initializer_<n>",
                _NAME,
                level=None if constants[automatic] == int(number) else "advice",
            )


def _is_outer(value: ir.Value, graph: ir.Graph) -> bool:
    producer = value.producer()
    return value.graph is not graph if producer is None else producer.graph is not graph


def nodes_are_named(subject: Subject) -> Iterator[Finding]:
    """Every node has a name of its own, not shared with a tensor."""
    for node in subject.nodes:
        if not node.name:
            yield Finding(
                ir.describe(node),
                "the node has no name",
                "the parser would make one up, and log and profile would not name the layer",
                _LEGALIZE,
            )
        elif node.name in subject.value_names:
            yield Finding(
                ir.describe(node),
                "the node has the name of a tensor",
                "inputs and constants become nodes: the two sets of names are kept apart",
                _LEGALIZE,
            )


def names_are_safe(subject: Subject) -> Iterator[Finding]:
    """Names of nodes and tensors, and the stricter ones of the interface."""
    for node in subject.nodes:
        if node.name and not _SAFE_NAME.fullmatch(node.name):
            yield Finding(ir.describe(node), "the node's name is not safe", _NAMES, _LEGALIZE)
    for name in sorted(subject.value_names):
        if not _SAFE_NAME.fullmatch(name):
            yield Finding(f"tensor {name!r}", "the tensor's name is not safe", _NAMES, _LEGALIZE)
    for value in (*subject.inputs, *subject.graph.outputs):
        if ":" in (value.name or ""):
            yield Finding(
                f"tensor {value.name!r}",
                "an input or output has a colon in its name",
                "the .om names outputs <node>:<index>:<tensor>, and --input_shape splits at it",
                "rename it",
                "",
                "advice",
            )


def names_are_short(subject: Subject) -> Iterator[Finding]:
    """Names of inputs and outputs have at most 127 characters."""
    for value in (*subject.inputs, *subject.graph.outputs):
        if len(value.name or "") > _NAME_LIMIT:
            yield Finding(
                f"tensor {value.name}",
                f"an input or output with a name of {len(value.name or '')} characters",
                "the runtime replaces longer names by made-up ones",
                "rename it",
            )


def inner_names_are_free(subject: Subject) -> Iterator[Finding]:
    """No node is named like one that the parser, or a plugin that expands a node, makes."""
    expanded = [
        node.name for node in subject.nodes if node.name and subject.plugin(node) == EXPANDED
    ]
    for node in subject.nodes:
        found = _PART.fullmatch(node.name or "")
        if node.name == NET_OUTPUT:
            why = "the node that gathers the graph's outputs has this name: there would be two"
        elif found is not None:
            part = found["part"]
            maker = next((name for name in expanded if part.startswith(name)), "")
            why = (
                f"{maker} is expanded into nodes of such names"
                if maker
                else "a node that a plugin expands becomes nodes of such names"
            )
        else:
            continue
        yield Finding(
            ir.describe(node), f"the node is named {node.name}", f"{why}, numbered in order", _NAME
        )


_CHECKER = "hicann/ge:parser/parser/common/pre_checker.cc"
_OMG = "hicann/ge:api/atc/omg.cc"

RULES = (
    Rule("node-names-unique", "E13009", _CHECKER, node_names_are_unique, certainty="seen"),
    Rule(
        "nodes-named",
        "E13009 where they collide",
        _CHECKER,
        nodes_are_named,
        certainty="inferred",
        level="advice",
    ),
    Rule(
        "names-safe",
        "names that cannot be told apart, or an error of a later step",
        _OMG,
        names_are_safe,
        certainty="inferred",
    ),
    Rule(
        "name-length",
        "a made-up name in acl.mdl's descriptions",
        "hicann/ge:docs/zh/api/graph_engine_api/c/acl (aclmdlGetTensorRealName)",
        names_are_short,
        level="advice",
    ),
    Rule(
        "inner-names",
        "two nodes of one name",
        "hicann/ge:parser/parser/common/parser_utils.cc (ExpandNodeToSubgraph); parser_types.cc",
        inner_names_are_free,
        certainty="seen",
        level="advice",
    ),
)
