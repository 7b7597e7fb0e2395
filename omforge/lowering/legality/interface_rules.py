"""Rules for the model as a whole: opset, functions, inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator

from omforge import ir
from omforge.lowering.legality.subject import Finding, Rule, Subject, describe_input
from omforge.lowering.target import DEFAULT_DOMAIN, registered

_LEGALIZE = "make the graph by `omforge compile`"

GEAR_INPUT = "ascend_mbatch_shape_data"
"""The input that atc adds to a model with gears."""

_INT8_OPS = ("AscendQuant", "AscendDequant", "NPUAscendQuantV2", "NPUQuantize", "QuantBatchMatMul")

REGISTERED_OPSETS = range(8, 19)
"""The opsets at which ATC registers the ordinary standard operators."""


def one_opset_import(subject: Subject) -> Iterator[Finding]:
    """One opset import, of the default domain."""
    others = sorted(set(subject.graph.opset_imports) - {"", "ai.onnx"})
    bare = any(not node.domain and node.op_type != "Constant" for node in subject.nodes)
    if others and (bare or subject.dialect):
        yield Finding(
            "",
            f"the model imports the domains {', '.join(others)} beside the default one",
            "older releases refuse a node without a domain when there is more than one import",
            "spell NPU ops in the default domain, and drop the imports",
        )


def opset_version(subject: Subject) -> Iterator[Finding]:
    """An opset that the standard operators are registered at; in the dialect, its opset."""
    imports = subject.graph.opset_imports
    found = imports.get("", imports.get("ai.onnx"))
    if found is None or found == subject.opset:
        return
    if found in REGISTERED_OPSETS:
        why = (
            f"opsets 8 to 18 parse, but the dialect is opset {subject.opset}: "
            "LayerNormalization is registered from 17 on, QuantBatchMatMul and "
            "NPUPromptFlashAttention up to 16"
        )
        what = f"the model's opset is {found}, not {subject.opset}"
        yield Finding("", what, why, _LEGALIZE, "", "advice")
        return
    refused = sum(
        node.domain in ("", DEFAULT_DOMAIN)
        and node.op_type != "Constant"
        and registered("", node.op_type, found) is None
        for node in subject.nodes
    )
    if refused or subject.dialect:
        yield Finding(
            "",
            f"the model's opset is {found}, not {subject.opset}",
            "operators are looked up by the exact opset; almost none is registered beyond 18: "
            f"atc lists {refused} nodes of this model",
            f"{_LEGALIZE} (part of `omforge compile`), or export at an opset from 8 to 18",
        )


def no_functions(subject: Subject) -> Iterator[Finding]:
    """Model-local functions are ignored by the parser."""
    called = {(node.domain, node.op_type): node for node in subject.nodes}
    for domain, name, _ in subject.model.functions:
        call = called.get((domain, name))
        harmless = call is None or subject.plugin(call) is not None
        yield Finding(
            f"function {domain}.{name}",
            "the model has functions of its own",
            "their bodies are ignored, so a call of one is an operator without a plugin",
            "run `inline-functions`",
            level="advice" if harmless else None,
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
                "give the input its shape in the model: --input_shape cannot change the rank",
            )
            continue
        dynamic = [str(dim) for dim in value.shape if not isinstance(dim, int)]
        if dynamic and not subject.gears:
            yield Finding(
                describe_input(value),
                f"the dims {', '.join(dynamic)} are not numbers",
                "a dynamic dim needs --input_shape with a number, gears or a range",
                "run `bind-shapes` with a number for each symbol, or give --input_shape",
                "E10001",
                "advice",
            )
        if any(isinstance(dim, int) and dim < 1 for dim in value.shape):
            yield Finding(
                describe_input(value),
                f"the shape {value.shape} has a dim below 1",
                "dims of inputs are positive",
                "bind a positive number, or remove the input",
            )


def gears(subject: Subject) -> Iterator[Finding]:
    """What gears (--dynamic_dims) demand of inputs and operators."""
    if not subject.gears:
        return
    for value in subject.inputs:
        rank = 0 if value.shape is None else value.shape.rank()
        if value.name == GEAR_INPUT:
            yield Finding(
                describe_input(value),
                "the input has the name of the input that atc adds",
                "with gears the .om gets one more input of this name",
                "rename it",
            )
        if rank > 4 and value.shape is not None and not value.shape.is_static():
            yield Finding(
                describe_input(value),
                f"a dynamic input of {rank} dims",
                "with --input_format=ND, inputs with gears have at most 4 dims",
                "merge dims, or compile one bucket for each shape",
            )
        if value.shape is not None and rank == 0:
            yield Finding(
                describe_input(value),
                "a scalar input in a model with gears",
                "with gears --input_shape must list it, as `name:`",
                f"write --input_shape with {value.name}:",
                level="advice",
            )
    for node in subject.typed(*_INT8_OPS):
        yield Finding(
            ir.describe(node),
            f"{node.op_type} in a model with gears",
            "quantised models with int8 inputs to quant operators cannot use dynamic shape options",
            "compile one bucket for each shape: drop --gears",
        )
        return  # one is enough: the model as a whole cannot have gears


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


_PARSER = "hicann/ge:parser/parser/onnx/onnx_parser.cc"
_OMG = "hicann/ge:api/atc/omg.cc"

_DATA = "hicann/ge:parser/parser/onnx/onnx_data_parser.cc"

RULES = (
    Rule(
        "one-opset-import",
        "E16005 in older releases",
        "hicann/ge:docs/zh/user_guides/error_codes/E16005",
        one_opset_import,
        certainty="inferred",  # which releases still raise it is not known
    ),
    Rule("opset-version", "E13010", _PARSER, opset_version, certainty="seen"),
    Rule(
        "no-functions",
        "E13010",
        "hicann/ge:graph_metadef/proto/onnx/ge_onnx.proto",
        no_functions,
        certainty="seen",
    ),
    Rule("inputs-and-outputs", "E16001", _PARSER, has_inputs_and_outputs, certainty="seen"),
    Rule("static-inputs", "a scalar, or a shape that no kernel takes", _DATA, static_inputs),
    Rule(
        "gears",
        "a failure behind the parser",
        "hicann/ge:docs/zh/user_guides/atc_tools/CLI_options (dynamic_dims; general_restrictions)",
        gears,
        certainty="inferred",
    ),
    Rule("int32-inputs", "slow", _DATA, int32_inputs, certainty="inferred", level="advice"),
    Rule(
        "outputs-made",
        "an output fed by Data or Const",
        _OMG,
        outputs_are_made,
        certainty="inferred",
    ),
    Rule(
        "outputs-distinct",
        "two outputs of one name",
        _OMG,
        outputs_are_distinct,
        certainty="inferred",
    ),
)
