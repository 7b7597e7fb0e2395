"""Rules for the protobuf message, which a loaded model no longer shows or loading refuses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

import onnx

from omforge.lowering.legality.file_subject import FileSubject, describe
from omforge.lowering.legality.subject import Finding, Rule

# The dtypes that the parser maps to GE ones (hicann/ge:parser/parser/onnx/onnx_util.cc).
_T = onnx.TensorProto
_MAPPED = frozenset(
    (
        *(_T.FLOAT, _T.UINT8, _T.INT8, _T.UINT16, _T.INT16, _T.INT32, _T.INT64, _T.STRING),
        *(_T.BOOL, _T.FLOAT16, _T.DOUBLE, _T.UINT32, _T.UINT64, _T.COMPLEX64, _T.COMPLEX128),
        *(_T.BFLOAT16, _T.FLOAT8E4M3FN, _T.FLOAT8E5M2, _T.INT4),
    )
)
_FLOAT8 = frozenset((_T.FLOAT8E4M3FN, _T.FLOAT8E5M2))
_BITS: Mapping[int, int] = {
    _T.INT4: 4,
    _T.UINT4: 4,
    _T.COMPLEX64: 64,
    _T.COMPLEX128: 128,
    _T.STRING: 0,
}
_LARGE = 1 << 20
_TYPED_DATA = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def opsets_once(subject: FileSubject) -> Iterator[Finding]:
    """Each domain is imported once."""
    counts = Counter(entry.domain or "ai.onnx" for entry in subject.proto.opset_import)
    for domain, count in counts.items():
        if count > 1:
            yield Finding(
                "",
                f"the model imports {count} opsets of {domain}",
                '"" and "ai.onnx" are one domain; the last import wins',
                "keep one of them",
            )


def parser_dtypes(subject: FileSubject) -> Iterator[Finding]:
    """Constants and graph inputs have a dtype that the parser knows."""
    for where, tensor, _ in subject.tensors:
        external = tensor.data_location == _T.EXTERNAL
        if tensor.data_type not in _MAPPED:
            why = "the parser has no dtype for it"
        elif tensor.data_type in _FLOAT8 and not external:
            why = "the loader of inline constants has no float8"
        else:
            continue
        yield Finding(
            where,
            f"a constant of dtype {_name(tensor.data_type)}",
            why,
            "store it in another dtype",
        )
    for value in _inputs(subject):
        kind = value.type.WhichOneof("value")
        if kind not in ("tensor_type", None):
            yield Finding(
                f"graph input {value.name}",
                f"an input that is a {kind.removesuffix('_type')}",
                "inputs are tensors",
                "give the parts as inputs of their own",
            )
        elif kind and value.type.tensor_type.elem_type not in _MAPPED:
            yield Finding(
                f"graph input {value.name}",
                f"an input of dtype {_name(value.type.tensor_type.elem_type)}",
                "the parser has no dtype for it",
                "declare another dtype",
            )


def constant_has_data(subject: FileSubject) -> Iterator[Finding]:
    """An inline constant holds as many numbers as its shape says."""
    for where, tensor, _ in subject.tensors:
        if tensor.data_location == _T.EXTERNAL or tensor.data_type not in _MAPPED:
            continue
        count = math.prod(tensor.dims)
        if count <= 0 or tensor.data_type == _T.STRING:
            continue
        held, needed = _held(tensor), count
        if tensor.HasField("raw_data"):
            held, needed = _raw_bytes(tensor), raw_size(tensor)
        if held == 0:
            yield Finding(
                where,
                f"a constant of {count} elements without data",
                "",
                "export the model again: its weights are gone",
            )
        elif held < needed:
            unit = "bytes" if tensor.HasField("raw_data") else "numbers"
            yield Finding(
                where,
                f"a constant with {held} of {needed} {unit}",
                "the last number is repeated without a word",
                "export the model again: its weights are cut off",
                "",
            )


def int4_is_raw(subject: FileSubject) -> Iterator[Finding]:
    """INT4 constants are stored as raw data."""
    for where, tensor, _ in subject.tensors:
        if tensor.data_type == _T.INT4 and tensor.int32_data:
            yield Finding(
                where,
                "int4 numbers in int32_data",
                "ATC reads eight numbers from each int32, ONNX writes two",
                "make the graph by `omforge compile`, which stores them as raw data",
            )


def constant_dims(subject: FileSubject) -> Iterator[Finding]:
    """The dims of a constant are not negative, and its elements fewer than 2^31."""
    for where, tensor, _ in subject.tensors:
        if any(dim < 0 for dim in tensor.dims):
            yield Finding(
                where, f"a constant of shape {list(tensor.dims)}", "dims are 0 or more", "mend it"
            )
        elif math.prod(tensor.dims) >= 1 << 31:
            yield Finding(
                where,
                f"a constant of {math.prod(tensor.dims)} elements",
                "the element count is kept in a C int",
                "split the tensor",
                "",
            )


def input_initializers(subject: FileSubject) -> Iterator[Finding]:
    """Inputs with an initializer are constants to atc."""
    constants = {tensor.name for tensor in subject.proto.graph.initializer}
    for value in subject.proto.graph.input:
        if value.name in constants:
            yield Finding(
                f"graph input {value.name}",
                "the input has an initializer",
                "it is a constant of the .om, and cannot be fed",
                "drop the initializer to keep the input, or the input to keep the constant",
            )


def input_names_once(subject: FileSubject) -> Iterator[Finding]:
    """No two graph inputs share a name."""
    counts = Counter(value.name for value in _inputs(subject))
    for name, count in counts.items():
        if count > 1:
            yield Finding(
                f"graph input {name}",
                f"{count} inputs of one name",
                "each graph input becomes a node of its name",
                "rename one of them",
            )


def made_once(subject: FileSubject) -> Iterator[Finding]:
    """A tensor has one producer."""
    for graph in subject.graphs:
        makers: dict[str, str] = {value.name: "the graph's inputs" for value in graph.input}
        makers.update((tensor.name, "the initializers") for tensor in graph.initializer)
        for node in graph.node:
            for name in node.output:
                if name and name in makers:
                    yield Finding(
                        describe(node),
                        f"tensor {name} is made twice",
                        f"it is made by {makers[name]} too; nodes are linked by tensor name",
                        "rename one of them",
                    )
                makers[name] = describe(node)


def made_at_all(subject: FileSubject) -> Iterator[Finding]:
    """What a node reads or the graph returns is made somewhere."""
    yield from _undefined(subject.proto.graph, frozenset())


def _undefined(graph: onnx.GraphProto, outer: frozenset[str]) -> Iterator[Finding]:
    names = {value.name for value in graph.input} | {item.name for item in graph.initializer}
    # Nodes are linked by name, whatever their order.
    names.update(name for node in graph.node for name in node.output)
    known = outer | names
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            if name and name not in known:
                yield Finding(
                    describe(node),
                    f"tensor {name} is made nowhere",
                    "nodes are linked by tensor name",
                    "export the model again, or connect the input",
                )
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _undefined(attribute.g, known)
    for value in graph.output:
        if value.name not in known:
            yield Finding(
                f"graph output {value.name}",
                "the output is made nowhere",
                "the output's node is looked up by tensor name",
                "name a tensor of the graph",
                "E19999",
            )


def nothing_ignored(subject: FileSubject) -> Iterator[Finding]:
    """The message holds nothing that the parser does not read."""
    for tensor in subject.proto.graph.sparse_initializer:
        yield Finding(
            f"sparse initializer {tensor.values.name}",
            "a sparse initializer",
            "it is not read, and its readers stay unconnected",
            "store it dense",
        )
    if subject.proto.training_info:
        yield Finding(
            "",
            "the model has training information",
            "it is not read",
            "export for inference",
            level="advice",
        )


def _inputs(subject: FileSubject) -> Iterator[onnx.ValueInfoProto]:
    constants = {tensor.name for tensor in subject.proto.graph.initializer}
    return (value for value in subject.proto.graph.input if value.name not in constants)


def _name(dtype: int) -> str:
    return _T.DataType.Name(dtype) if dtype in _T.DataType.values() else str(dtype)


def _bits(dtype: int) -> int:
    found = _BITS.get(dtype)
    if found is not None:
        return found
    return onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize * 8


def raw_size(tensor: onnx.TensorProto) -> int:
    """The bytes that dims and dtype say; 0 for strings."""
    return -(-math.prod(tensor.dims) * _bits(tensor.data_type) // 8)


def _held(tensor: onnx.TensorProto) -> int:
    """The numbers in the typed lists; an int32 holds two of 4 bits, and complex ones are pairs."""
    held = sum(len(getattr(tensor, name)) for name in _TYPED_DATA)
    if tensor.data_type == _T.INT4:
        return 2 * held
    return held // 2 if tensor.data_type in (_T.COMPLEX64, _T.COMPLEX128) else held


def _raw_bytes(tensor: onnx.TensorProto) -> int:
    """The bytes of raw_data; of a large tensor with its name and dims, since asking copies them."""
    whole = tensor.ByteSize()
    return whole if whole > _LARGE else len(tensor.raw_data)


_PARSER = "hicann/ge:parser/parser/onnx/onnx_parser.cc"
_CONSTANTS = "hicann/ge:parser/parser/onnx/onnx_constant_parser.cc"
_DTYPES = "hicann/ge:parser/parser/onnx/onnx_util.cc"

RULES: tuple[Rule[FileSubject], ...] = (
    Rule(
        "opsets-once",
        "E16005 in older releases, or another opset than meant",
        _PARSER,
        opsets_once,
        "inferred",
    ),
    Rule(
        "parser-dtype",
        "E19999: data type undefined or not supported",
        _DTYPES,
        parser_dtypes,
        "seen",
    ),
    Rule("constant-data", "E19999: no elements or raw_data", _CONSTANTS, constant_has_data),
    Rule("int4-raw", "wrong weights without a word", _CONSTANTS, int4_is_raw),
    Rule("constant-dims", "E19999, or a wrong element count", _CONSTANTS, constant_dims),
    Rule(
        "input-initializers",
        "the input is no longer one",
        _PARSER,
        input_initializers,
        level="advice",
    ),
    Rule(
        "input-names",
        "E13009",
        "hicann/ge:parser/parser/common/pre_checker.cc",
        input_names_once,
        "inferred",
    ),
    Rule("tensor-made-once", "a reader of the wrong tensor", _PARSER, made_once, "inferred"),
    Rule("tensor-made", "an unconnected input, or an error", _PARSER, made_at_all, "inferred"),
    Rule("nothing-ignored", "unconnected inputs", _PARSER, nothing_ignored),
)
