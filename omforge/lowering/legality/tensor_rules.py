"""Rules for tensors: dtypes of the SoC, and how constants are stored."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from omforge import ir
from omforge.lowering.legality.subject import Finding, Rule, Subject, describe_input
from omforge.lowering.target import dtype_name

_UNKNOWN_DTYPES = frozenset(
    ("UINT4", "FLOAT4E2M1", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ", "FLOAT8E8M0", "INT2", "UINT2")
)

# Inputs that plugins and shape inference read while parsing: their numbers must be in the .onnx.
_READ_AT_PARSE_TIME = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
}


def soc_dtypes(subject: Subject) -> Iterator[Finding]:
    """No tensor has a dtype that the SoC does not compute in."""
    places = [(describe_input(value), value.dtype) for value in subject.inputs]
    places += [(where, tensor.dtype) for where, tensor, _ in subject.constants]
    places += [
        (ir.describe(node), value.dtype)
        for node in subject.nodes
        if node.op_type != "Constant"
        for value in node.outputs
    ]
    for where, dtype in places:
        name = dtype_name(dtype)
        if not name or name in subject.target.dtypes or dtype is None:
            continue
        if dtype.name in _UNKNOWN_DTYPES:
            continue  # reported by parser_dtypes
        yield Finding(
            where,
            f"{name} on {subject.target.soc_version}",
            f"{subject.target.soc_version} allows {', '.join(sorted(subject.target.dtypes))}",
            _DTYPE_REMEDIES.get(name, "cast to a dtype that the SoC has"),
        )


_DTYPE_REMEDIES = {
    "bfloat16": "run `convert-precision{dtype=fp16}`",
    "float64": "run `convert-precision`: double runs on the AICPU, if at all",
    "int4": "quantise to int8 for this SoC",
}


def parser_dtypes(subject: Subject) -> Iterator[Finding]:
    """Constants have a dtype that the parser can load."""
    for where, tensor, _ in subject.constants:
        name = tensor.dtype.name
        if name in _UNKNOWN_DTYPES:
            why = f"the parser has no dtype for ONNX's {name}"
        elif name.startswith("FLOAT8") and not isinstance(tensor, ir.ExternalTensor):
            why = "the loader of inline constants has no float8"
        else:
            continue
        yield Finding(where, f"a constant of dtype {name}", why, "store it in another dtype")


def int4_is_raw(subject: Subject) -> Iterator[Finding]:
    """INT4 constants are stored as raw data."""
    for where, tensor, _ in subject.constants:
        raw = getattr(tensor, "raw", None)
        if tensor.dtype != ir.DataType.INT4 or not isinstance(raw, onnx.TensorProto):
            continue
        if raw.int32_data:
            yield Finding(
                where,
                "int4 numbers in int32_data",
                "ATC reads eight numbers from each int32, ONNX writes two",
                "make the graph by `omforge compile`, which stores them as raw data",
            )


def constant_size(subject: Subject) -> Iterator[Finding]:
    """A constant has fewer than 2^31 elements."""
    for where, tensor, _ in subject.constants:
        if tensor.size >= 1 << 31:
            yield Finding(
                where,
                f"a constant of {tensor.size} elements",
                "the element count is kept in a C int",
                "split the tensor",
            )


def external_in_root_only(subject: Subject) -> Iterator[Finding]:
    """Constants inside subgraphs are inline."""
    for where, tensor, in_root in subject.constants:
        if isinstance(tensor, ir.ExternalTensor) and not in_root:
            yield Finding(
                where,
                "an external tensor inside a subgraph",
                "only tensors of the root graph have their path made relative to the model",
                "move it to the root graph, or store it inline",
            )


def shape_constants_inline(subject: Subject) -> Iterator[Finding]:
    """Shapes, axes, sizes and the like are inline."""
    for node in subject.nodes:
        for index in _READ_AT_PARSE_TIME.get(node.op_type, ()) if node.domain == "" else ():
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and isinstance(value.const_value, ir.ExternalTensor):
                yield Finding(
                    ir.describe(node),
                    f"input {index}, {value.name}, is external data",
                    "plugins and shape inference read it, and an external tensor is a FileConstant",
                    "save with tensors below 1 KB inline",
                )


def constants_use_value(subject: Subject) -> Iterator[Finding]:
    """A Constant node has the attribute `value`."""
    for node in subject.typed("Constant"):
        if "value" not in node.attributes:
            spelled = ", ".join(sorted(node.attributes)) or "nothing"
            yield Finding(
                ir.describe(node),
                f"a Constant spelled with {spelled}",
                "only `value` is read; the others give an empty tensor without a word",
                "make the graph by `omforge compile`",
            )


_CONSTANTS = "hicann/ge:parser/parser/onnx/onnx_constant_parser.cc"
_FILE_CONSTANTS = "hicann/ge:parser/parser/onnx/onnx_file_constant_parser.cc"

RULES = (
    Rule(
        "soc-dtype",
        "no kernel, or a silent cast to float16",
        "hicann/ge:docs/zh/user_guides/atc_tools/CLI_options",
        soc_dtypes,
    ),
    Rule("shape-constants-inline", "an unknown shape", _FILE_CONSTANTS, shape_constants_inline),
    Rule("constant-value", "an empty tensor", _CONSTANTS, constants_use_value, "seen"),
)

MEMORY_RULES = (
    Rule(
        "parser-dtype",
        "E19999: data type undefined or not supported",
        "hicann/ge:parser/parser/onnx/onnx_util.cc",
        parser_dtypes,
        "seen",
    ),
    Rule("int4-raw", "wrong weights without a word", _CONSTANTS, int4_is_raw),
    Rule("constant-dims", "a wrong element count", _CONSTANTS, constant_size),
    Rule("external-in-root", "the file is not found", _FILE_CONSTANTS, external_in_root_only),
)
"""For a model in memory; of a file, `message_rules` and `file_rules` say the same."""
