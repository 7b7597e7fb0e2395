"""What must be true of an ONNX file before anything walks its graph, checked once, on reading.

Passes, inference and the runtime rely on it, so that none of them has to ask again: dims are not
negative, a tensor holds what its shape and dtype say, names are made once, inputs and outputs are
tensors, attributes hold something. Order and functions are `graph_order`'s, external data is
`files`'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from omforge.ir.diagnostics import format_diagnostics
from omforge.ir.errors import InputError
from omforge.ir.graph_order import inner_graphs, label
from omforge.ir.verify import verify

_T = onnx.TensorProto
_A = onnx.AttributeProto

NEXT = "Export the model again, or mend the file"
SHOWN = 20

_TYPED: Mapping[str, tuple[int, ...]] = {
    "float_data": (_T.FLOAT, _T.COMPLEX64),
    "double_data": (_T.DOUBLE, _T.COMPLEX128),
    "int64_data": (_T.INT64,),
    "uint64_data": (_T.UINT32, _T.UINT64),
    "string_data": (_T.STRING,),
    # All others, of 32 bits and less, are in int32_data.
}
TYPED_FIELDS = (*_TYPED, "int32_data")
"""The fields of a TensorProto that hold numbers of one type."""

_IN_INT32: Mapping[int, tuple[int, int]] = {
    _T.INT16: (-(1 << 15), (1 << 15) - 1),
    _T.INT8: (-(1 << 7), (1 << 7) - 1),
    _T.BOOL: (0, 1),
    **dict.fromkeys((_T.UINT16, _T.FLOAT16, _T.BFLOAT16), (0, (1 << 16) - 1)),
    **dict.fromkeys((_T.UINT8, _T.FLOAT8E4M3FN, _T.FLOAT8E5M2), (0, (1 << 8) - 1)),
}
_PAIRS = (_T.COMPLEX64, _T.COMPLEX128)
_LARGE = 1 << 16  # bytes that may be copied to be counted

FATAL = frozenset(
    {
        "undefined-value",
        "dangling-edge",
        "missing-output",
        "empty-initializer",
        "missing-opset-import",
        "arity",
        "missing-input",
        "attribute-type",
        "missing-attribute",
    }
)
"""The faults of the verifier with which no pass starts: it would look for what is not there."""


class ReadByAtc(str):
    """A fault past which atc's parser goes on, by a rule of its own that `check` knows."""


def check_message(file: Path, message: onnx.ModelProto, *, as_atc: bool = False) -> None:
    """Check the message ahead of onnx-ir, which takes most of these faults and fails later.

    Args:
        file: Where it is from.
        message: The model.
        as_atc: Let pass what is `ReadByAtc`.

    Raises:
        InputError: Names the file, and every fault with its place.
    """
    faults = _faults(message)
    _refuse(file, [f for f in faults if not (as_atc and isinstance(f, ReadByAtc))])


def check_loaded(file: Path, model: ir.Model) -> None:
    """Check what the verifier knows: edges, and each node against its operator's schema.

    Raises:
        InputError: Names the file, and every fault with its place.
    """
    found = [diagnostic for diagnostic in verify(model) if diagnostic.code in FATAL]
    if found:
        raise InputError(
            f"{file} is not a valid model", f"\n{format_diagnostics(found[:SHOWN])}\n", NEXT
        )


def require_known_operators(file: Path, model: ir.Model) -> None:
    """Refuse operators of ONNX's own domains that no opset defines, or only a later one.

    `check` and `opt` take such a graph, where most nodes may be anything. Nothing can raise it.

    Raises:
        InputError: Names the file, and every such node.
    """
    found = [diagnostic for diagnostic in verify(model) if diagnostic.code == "unknown-op"]
    if found:
        raise InputError(
            f"{file} has operators that ONNX does not know",
            f"\n{format_diagnostics(found[:SHOWN])}\n",
            NEXT,
        )


def _refuse(file: Path, faults: list[str]) -> None:
    if not faults:
        return
    if len(faults) == 1:
        raise InputError(f"{file} is not a valid model", faults[0], NEXT)
    shown = "\n  ".join(faults[:SHOWN])
    more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    raise InputError(
        f"{file} is not a valid model", f"{len(faults)} faults\n  {shown}{more}\n", NEXT
    )


def _faults(message: onnx.ModelProto) -> Iterator[str]:
    main = message.graph
    for kind, values in (("input", main.input), ("output", main.output)):
        for value in values:
            yield from _interface(f"{kind} {value.name}", value.type, typed=kind == "input")
    yield from _graph(main)
    for function in message.functions:
        for node in function.node:
            yield from _node(node, inside_function=True)


def _interface(place: str, kind: onnx.TypeProto, *, typed: bool) -> Iterator[str]:
    """An input or output of the model is a tensor."""
    which = kind.WhichOneof("value")
    if which is None:
        if typed:
            yield f"graph {place} has no type"
    elif which != "tensor_type":
        yield f"graph {place} is of type {which.removesuffix('_type')}; only tensors are taken"
    elif typed and not kind.tensor_type.elem_type:
        yield f"graph {place} has no dtype"


def _graph(graph: onnx.GraphProto, *, inside_function: bool = False) -> Iterator[str]:
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield from _dims(value)
    yield from _names(graph)
    for tensor in graph.initializer:
        yield from tensor_faults(f"tensor {tensor.name}", tensor)
    for sparse in graph.sparse_initializer:
        yield ReadByAtc(f"tensor {sparse.values.name} is sparse, which is not read")
    for node in graph.node:
        yield from _node(node, inside_function=inside_function)


def _dims(value: onnx.ValueInfoProto) -> Iterator[str]:
    kind = value.type
    if not kind.HasField("tensor_type"):
        return
    dtype = kind.tensor_type.elem_type
    if dtype and dtype not in _T.DataType.values():
        yield f"{value.name} is of dtype {dtype}, which onnx {onnx.__version__} does not know"
    for dim in kind.tensor_type.shape.dim:
        if dim.dim_value < 0:
            yield f"{value.name} has a dim of {dim.dim_value}; dims are 0 or more"
            return


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """A name is made once in a graph; an initializer may be the default of an input."""
    made: dict[str, str] = {}
    for value in graph.input:
        if value.name in made:
            yield ReadByAtc(f"two inputs are called {value.name!r}")
        made[value.name] = "an input"
    seen: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name in seen:
            yield ReadByAtc(f"two initializers are called {tensor.name!r}")
        seen.add(tensor.name)
    made.update(dict.fromkeys(seen, "an initializer"))
    for node in graph.node:
        for name in node.output:
            if not name:
                continue
            if name in made:
                yield ReadByAtc(f"{label(node)} makes {name}, which {made[name]} makes too")
            made[name] = label(node)


def _node(node: onnx.NodeProto, *, inside_function: bool) -> Iterator[str]:
    place = label(node)
    if not node.op_type:
        yield f"node {place} has no operator"
    if not any(node.output):
        yield f"{place} has no output"
    names: set[str] = set()
    for attribute in node.attribute:
        if attribute.name in names:
            yield ReadByAtc(f"{place} has its attribute {attribute.name} twice")
        names.add(attribute.name)
        yield from _attribute(place, attribute, inside_function=inside_function)
    if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and len(names) != 1:
        count = f"{len(names)} values" if names else "no value"
        yield f"{place} has {count}; a Constant has one"
    for graph in inner_graphs(node):
        yield from _graph(graph, inside_function=inside_function)


def _attribute(place: str, attribute: _A, *, inside_function: bool) -> Iterator[str]:
    where = f"attribute {attribute.name} of {place}"
    if attribute.ref_attr_name:
        if not inside_function:
            yield f"{where} refers to {attribute.ref_attr_name}, and is not in a function"
        return
    kind = attribute.type
    if kind == _A.UNDEFINED:
        yield ReadByAtc(f"{where} has no type")
    elif kind == _A.TENSOR:
        if attribute.HasField("t"):
            yield from tensor_faults(where, attribute.t)
        else:
            yield f"{where} holds no tensor"
    elif kind == _A.TENSORS:
        for tensor in attribute.tensors:
            yield from tensor_faults(where, tensor)
    elif kind in (_A.SPARSE_TENSOR, _A.SPARSE_TENSORS):
        yield f"{where} is sparse, which is not read"
    elif kind == _A.GRAPH and not attribute.HasField("g"):
        yield f"{where} holds no graph"
    elif kind == _A.STRING:
        if not _is_text(attribute.s):
            yield f"{where} is no UTF-8 text"
    elif kind == _A.STRINGS and not all(map(_is_text, attribute.strings)):
        yield f"{where} is no UTF-8 text"


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


# --- tensors --------------------------------------------------------------------------------------


def tensor_faults(place: str, tensor: _T) -> Iterator[str]:
    """A tensor has a dtype, a shape, and the data of both."""
    dtype = tensor.data_type
    if dtype == _T.UNDEFINED or dtype not in _T.DataType.values():
        yield f"{place} is of dtype {dtype}, which onnx {onnx.__version__} does not know"
        return
    if any(dim < 0 for dim in tensor.dims):
        yield f"{place} has the shape {list(tensor.dims)}; dims are 0 or more"
        return
    if tensor.HasField("segment"):
        yield f"{place} is one segment of a tensor, which is not read"
        return
    if tensor.data_location == _T.EXTERNAL:
        yield from _entries(place, tensor)
        return
    count = math.prod(tensor.dims)
    shape = f"{_T.DataType.Name(dtype)}{list(tensor.dims)}"
    if tensor.HasField("raw_data"):
        if dtype == _T.STRING:
            yield f"{place} holds strings as raw data"
            return
        needed = -(-count * ir.DataType(dtype).bitwidth // 8)
        held = _raw_bytes(tensor, needed)
        if held != needed:
            fault = f"{place} holds {held} bytes, and {shape} needs {needed}"
            yield ReadByAtc(fault) if held > needed else fault
        return
    field = next((name for name, dtypes in _TYPED.items() if dtype in dtypes), "int32_data")
    held = len(getattr(tensor, field))
    for other in TYPED_FIELDS:
        if other != field and len(getattr(tensor, other)):
            yield f"{place} holds {other}, and {shape} is stored in {field}"
            return
    bits = 8 if dtype == _T.STRING else ir.DataType(dtype).bitwidth
    # Types of less than a byte are packed as they are in raw data, one byte a number.
    needed = 2 * count if dtype in _PAIRS else -(-count * min(bits, 8) // 8)
    if not held and needed:
        yield f"{place} has shape {list(tensor.dims)} and no data"
    elif held != needed and bits != 6:  # 6 bits are stored in two ways
        yield f"{place} holds {held} numbers, and {shape} needs {needed}"
    elif field == "int32_data" and held:
        yield from _range(place, tensor)


def _entries(place: str, tensor: _T) -> Iterator[str]:
    """External data is described by whole numbers; whether it is there, `files` looks."""
    if tensor.data_type == _T.STRING:
        yield f"{place} holds strings in another file; ONNX keeps them in the model"
    for entry in tensor.external_data:
        if entry.key in ("offset", "length") and not entry.value.strip().isdecimal():
            yield f"{place} is external data with {entry.key} {entry.value!r}, which is no number"


def _range(place: str, tensor: _T) -> Iterator[str]:
    """An int32 holds more than the type that is stored in it."""
    least, most = _IN_INT32.get(tensor.data_type, (-(1 << 31), (1 << 32) - 1))
    numbers = np.asarray(tensor.int32_data)
    for found in (int(numbers.min()), int(numbers.max())):
        if not least <= found <= most:
            name = _T.DataType.Name(tensor.data_type)
            yield f"{place} holds {found}, and {name} is {least} to {most}"
            return


def _raw_bytes(tensor: _T, needed: int) -> int:
    """The bytes of raw_data; asking for those of a large tensor would copy them."""
    whole = tensor.ByteSize()
    if whole <= _LARGE:
        return len(tensor.raw_data)
    shell = _T(
        dims=tensor.dims,
        data_type=tensor.data_type,
        name=tensor.name if tensor.HasField("name") else None,
        doc_string=tensor.doc_string if tensor.HasField("doc_string") else None,
        external_data=tensor.external_data,
        data_location=tensor.data_location if tensor.HasField("data_location") else None,
        metadata_props=tensor.metadata_props,
    )
    # A tag of one byte, the length in groups of 7 bits, the data.
    expected = shell.ByteSize() + 1 + max(1, -(-needed.bit_length() // 7)) + needed
    return needed if whole == expected else len(tensor.raw_data)
