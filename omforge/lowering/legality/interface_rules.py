"""Rules for the model as a whole: opset, functions, inputs, outputs and names."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator

from omforge import ir
from omforge.lowering.legality.subject import Finding, Rule, Subject, describe_input
from omforge.lowering.target import EXPANDED, registered

_SAFE_NAME = re.compile(r"[A-Za-z0-9_./:-]+")
_NAMES = "names of nodes and tensors use A-Z a-z 0-9 _ . / : - only"
_LEGALIZE = "run `legalize`"


def one_opset_import(subject: Subject) -> Iterator[Finding]:
    """One opset import, of the default domain."""
    others = sorted(set(subject.graph.opset_imports) - {"", "ai.onnx"})
    if others:
        yield Finding(
            "",
            f"the model imports the domains {', '.join(others)} beside the default one",
            "older releases refuse a node without a domain when there is more than one import",
            "spell NPU ops in the default domain, and drop the imports",
        )


def opset_version(subject: Subject) -> Iterator[Finding]:
    """The opset of the dialect."""
    imports = subject.graph.opset_imports
    found = imports.get("", imports.get("ai.onnx"))
    if found == subject.opset:
        return
    if found is not None and 11 <= found <= 18:
        why = (
            f"opsets 11 to 18 parse, but the dialect is opset {subject.opset}: "
            "LayerNormalization is registered from 17 on, QuantBatchMatMul and "
            "NPUPromptFlashAttention up to 16"
        )
    else:
        why = "operators are looked up by the exact opset; almost none is registered beyond 18"
    yield Finding("", f"the model's opset is {found}, not {subject.opset}", why, _LEGALIZE)


def no_functions(subject: Subject) -> Iterator[Finding]:
    """Model-local functions are ignored by the parser."""
    for domain, name, _ in subject.model.functions:
        yield Finding(
            f"function {domain}.{name}",
            "the model has functions of its own",
            "their bodies are ignored, so a call of one is an operator without a plugin",
            "run `inline-functions`",
        )


def has_inputs_and_outputs(subject: Subject) -> Iterator[Finding]:
    """At least one input that is no initializer, and at least one output."""
    for kind, values in (("inputs", subject.inputs), ("outputs", subject.graph.outputs)):
        if not values:
            yield Finding(
                "",
                f"the graph has no {kind}",
                "a model needs at least one input that is no initializer, and one output",
                "give the graph its interface",
            )


def static_inputs(subject: Subject) -> Iterator[Finding]:
    """Every input has a shape of positive numbers."""
    for value in subject.inputs:
        if value.shape is None:
            yield Finding(
                describe_input(value),
                "the input has no shape",
                "it becomes a scalar",
                "run `bind-shapes`",
            )
            continue
        dynamic = [str(dim) for dim in value.shape if not isinstance(dim, int)]
        if dynamic:
            yield Finding(
                describe_input(value),
                f"the dims {', '.join(dynamic)} are not numbers",
                "a dynamic dim needs gears or a shape range, and a bucket has neither",
                "run `bind-shapes` with a number for each symbol",
            )
        if any(isinstance(dim, int) and dim < 1 for dim in value.shape):
            yield Finding(
                describe_input(value),
                f"the shape {value.shape} has a dim below 1",
                "dims of inputs are positive",
                "bind a positive number, or remove the input",
            )


def int32_inputs(subject: Subject) -> Iterator[Finding]:
    """No int64 inputs: token, position and row numbers fit in int32."""
    for value in subject.inputs:
        if value.dtype == ir.DataType.INT64:
            yield Finding(
                describe_input(value),
                "the input is int64",
                "it stays int64, and much of what int64 feeds runs on the AICPU",
                _LEGALIZE + ", which makes it int32",
            )


def outputs_are_made(subject: Subject) -> Iterator[Finding]:
    """An output is neither an input nor a constant."""
    for value in subject.graph.outputs:
        if value.is_graph_input() or value.is_initializer():
            yield Finding(
                f"graph output {value.name}",
                "the output is an input or a constant of the graph",
                "the .om's output would be fed by a Data or Const node",
                "put an Identity in front of the output",
            )


def outputs_are_distinct(subject: Subject) -> Iterator[Finding]:
    """No output is listed twice."""
    names = [value.name for value in subject.graph.outputs]
    for name in sorted({name or "" for name in names if names.count(name) > 1}):
        yield Finding(
            f"graph output {name}",
            "the output is listed more than once",
            "outputs of the .om are told apart by their tensor names",
            "put an Identity in front of each further one",
        )


def node_names_are_unique(subject: Subject) -> Iterator[Finding]:
    """Node names are unique, also among the nodes that the parser adds."""
    inputs = {value.name for value in subject.inputs}
    unnamed = {node.op_type for node in subject.nodes if not node.name}
    for node in subject.nodes:
        name = node.name
        if not name:
            continue
        automatic, _, number = name.rpartition("_")
        if subject.node_names[name] > 1:
            yield Finding(ir.describe(node), "the node's name is used twice", "", _LEGALIZE)
        elif name in inputs:
            yield Finding(
                ir.describe(node),
                "the node has the name of a graph input",
                "each graph input becomes a node of that name",
                _LEGALIZE,
            )
        elif number.isdigit() and automatic in unnamed:
            yield Finding(
                ir.describe(node),
                "the node has a name that the parser may give",
                f"a {automatic} node without a name is named {automatic}_<n>",
                _LEGALIZE,
            )
        elif number.isdigit() and automatic.endswith("_Initializer"):
            yield Finding(
                ir.describe(node),
                "the node has a name that the parser may give",
                "an initializer becomes a node named <name>_Initializer_<n>",
                _LEGALIZE,
            )


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
            )


def inner_names_are_free(subject: Subject) -> Iterator[Finding]:
    """No node is named like a node inside an expanded one."""
    ordered = sorted(subject.node_names)
    for node in subject.nodes:
        if not node.name or registered(node.domain, node.op_type, subject.opset) != EXPANDED:
            continue
        prefix = f"{node.name}_"
        at = bisect.bisect_left(ordered, prefix)
        if at < len(ordered) and ordered[at].startswith(prefix):
            yield Finding(
                ir.describe(node),
                f"another node's name, {ordered[at]}, begins with this one's and an underscore",
                f"{node.op_type} is expanded into nodes named {prefix}<suffix>",
                _LEGALIZE,
            )


_PARSER = "hicann/ge:parser/parser/onnx/onnx_parser.cc"
_CHECKER = "hicann/ge:parser/parser/common/pre_checker.cc"
_OMG = "hicann/ge:api/atc/omg.cc"

RULES = (
    Rule(
        "one-opset-import",
        "E16005 in older releases",
        "hicann/ge:docs/zh/user_guides/error_codes/E16005",
        one_opset_import,
    ),
    Rule("opset-version", "E13010", _PARSER, opset_version),
    Rule(
        "no-functions", "E13010", "hicann/ge:graph_metadef/proto/onnx/ge_onnx.proto", no_functions
    ),
    Rule("inputs-and-outputs", "E16001", _PARSER, has_inputs_and_outputs),
    Rule(
        "static-inputs",
        "E10001, or a scalar",
        "hicann/ge:parser/parser/onnx/onnx_data_parser.cc",
        static_inputs,
    ),
    Rule("int32-inputs", "slow", "hicann/ge:parser/parser/onnx/onnx_data_parser.cc", int32_inputs),
    Rule("outputs-made", "an output fed by Data or Const", _OMG, outputs_are_made),
    Rule("outputs-distinct", "two outputs of one name", _OMG, outputs_are_distinct),
    Rule("node-names-unique", "E13009", _CHECKER, node_names_are_unique),
    Rule("nodes-named", "E13009 where they collide", _CHECKER, nodes_are_named),
    Rule("names-safe", "E10001 or names that cannot be told apart", _OMG, names_are_safe),
    Rule("inner-names", "E13009", _CHECKER, inner_names_are_free),
)
