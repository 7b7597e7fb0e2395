"""A model as text: for reading, for comparing two models, and for tests.

The text is ONNX's own (`onnx.parser` reads it), with one initializer per line, and with large
tensors replaced by their type, shape and hash, so that the text of a 7B model is as short as that
of its graph. Names, nodes, types of inputs and outputs are kept; doc strings and metadata are not,
since exporters fill them with stack traces.
"""

import hashlib
import re

import numpy as np
import onnx
import onnx_ir as ir

from omforge.ir.weights import chunks, replaced_tensors

SMALL = 16  # elements that are still written out
HASH_DIGITS = 12
IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)  # onnx.parser takes their bits as integers
INTEGERS = (
    ir.DataType.BOOL,
    ir.DataType.INT8,
    ir.DataType.INT16,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.UINT8,
    ir.DataType.UINT16,
    ir.DataType.UINT32,
    ir.DataType.UINT64,
)
# Narrower types are always elided: onnx.parser 1.23 reads int4 {1, 2, 3} as {1, 0, 2}.
READABLE = (*FLOATS, *HALVES, *INTEGERS, ir.DataType.STRING)


def to_text(model: ir.Model, *, types: bool = False) -> str:
    """Return the model as ONNX text; the same model gives the same text.

    A tensor of more than 16 elements is written `float[320,64] name = sha256:0123456789ab`. Without
    such tensors `onnx.parser.parse_model` returns the model again. Tensors in subgraphs and in
    attributes are written as a string tensor that holds the same words.

    Args:
        model: The model, left as it is.
        types: Also write the types of the values between nodes.
    """
    lines = [_initializer(value) for value in model.graph.initializers.values()]
    if types:
        lines += [_declaration(v) for node in model.graph for v in node.outputs if _is_typed(v)]
    with replaced_tensors(model, _elided):
        proto = ir.to_proto(model)
    _keep_the_graph(proto)
    text = onnx.printer.to_text(proto).rstrip() + "\n"
    if not lines:
        return text
    return _insert_block(text, "   <\n" + ",\n".join(f"      {line}" for line in lines) + "\n   >")


def _keep_the_graph(proto: onnx.ModelProto) -> None:
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        proto.ClearField(field)
    for message in (proto, proto.graph, *proto.graph.node):
        message.ClearField("metadata_props")
    proto.graph.ClearField("initializer")
    proto.graph.ClearField("value_info")


def _insert_block(text: str, block: str) -> str:
    """Put the declarations between the graph's signature and its body."""
    signature, body = re.split(r"\s*\n?\{\n", text, maxsplit=1)
    return f"{signature.rstrip()}\n{block}\n{{\n{body}"


def _is_typed(value: ir.Value) -> bool:
    typed = isinstance(value.type, ir.TensorType) and value.shape is not None
    return typed and bool(value.name) and not value.is_graph_output()


def _declaration(value: ir.Value) -> str:
    assert value.shape is not None
    dims = [str(d) if isinstance(d, int) else _quoted(str(d.value or "?")) for d in value.shape]
    return f"{_type(value.dtype, dims)} {_quoted(value.name or '')}"


def _initializer(value: ir.Value) -> str:
    name, tensor = value.name or "", value.const_value
    if tensor is None:
        return f"undefined {_quoted(name)}"
    dims = [str(dim) for dim in tensor.shape.numpy()]
    words = _digest(tensor) if _is_elided(tensor) else "{" + ", ".join(_elements(tensor)) + "}"
    return f"{_type(tensor.dtype, dims)} {_quoted(name)} = {words}"


def _type(dtype: ir.DataType | None, dims: list[str]) -> str:
    shape = f"[{','.join(dims)}]" if dims else ""
    return f"{dtype.name.lower() if dtype else 'undefined'}{shape}"


def _quoted(name: str) -> str:
    return name if IDENTIFIER.fullmatch(name) else '"' + name.replace('"', '\\"') + '"'


def _elements(tensor: ir.TensorProtocol) -> list[str]:
    if tensor.dtype is ir.DataType.STRING:
        return [_string(item) for item in np.asarray(tensor.numpy(), dtype=object).ravel()]
    values = tensor.numpy().ravel()
    if tensor.dtype in HALVES:
        values = values.view(np.uint16)
    if tensor.dtype in FLOATS:
        return [str(item) for item in values]  # numpy's shortest form that reads back the same
    return [str(int(item)) for item in values]


def _string(item: bytes | str) -> str:
    text = item if isinstance(item, str) else item.decode(errors="replace")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _is_elided(tensor: ir.TensorProtocol) -> bool:
    return tensor.size > SMALL or tensor.dtype not in READABLE


def _elided(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
    if not _is_elided(tensor):
        return None
    dims = [str(dim) for dim in tensor.shape.numpy()]
    words = f"{_type(tensor.dtype, dims)} {_digest(tensor)}"
    return ir.StringTensor([words.encode()], shape=ir.Shape([1]), name=tensor.name)


def _digest(tensor: ir.TensorProtocol) -> str:
    digest = hashlib.sha256()
    if isinstance(tensor, ir.StringTensor):
        for item in tensor.string_data():
            digest.update(item)
    else:
        for chunk in chunks(tensor):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()[:HASH_DIGITS]}"
