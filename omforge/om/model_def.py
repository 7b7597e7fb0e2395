"""MODEL_DEF: the graph as ge.proto.ModelDef, read and written without protobuf's generated code.

Only what names inputs, outputs and operators is decoded; other fields are skipped. Field numbers:
hicann/ge:graph_metadef/proto/ge_ir.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from omforge.air.ge_types import byte_size, proto_dtype, proto_number
from omforge.ir.errors import InputError
from omforge.om.inout import InOut, OmTensor

INPUT_TYPES = ("Data", "AippData", "AnnData", "RefData")
OUTPUT_TYPE = "NetOutput"
OUT_NODES = "attr_model_out_nodes_name"
ORIGIN_DIMS = "_mbatch_origin_input_dims"

Attribute = int | float | bool | str | tuple[int, ...] | tuple[str, ...]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class TensorDesc:
    """A tensor of an operator's input or output; `size` is what GE reserves, 0 if not said."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = "ND"
    size: int = 0
    name: str = ""


@dataclass(frozen=True)
class OpDef:
    """One operator. `inputs` are "producer:index"; a control edge has the index -1."""

    name: str
    type: str
    inputs: tuple[str, ...] = ()
    input_desc: tuple[TensorDesc, ...] = ()
    output_desc: tuple[TensorDesc, ...] = ()
    attributes: Mapping[str, Attribute] = field(default_factory=dict[str, Attribute])
    src_name: tuple[str, ...] = ()
    src_index: tuple[int, ...] = ()
    subgraphs: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphDef:
    """One graph; the first of a model is the main one."""

    name: str
    ops: tuple[OpDef, ...]


@dataclass(frozen=True)
class ModelDef:
    """The model; attributes of kinds that omforge does not need are left out."""

    name: str
    graphs: tuple[GraphDef, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict[str, Attribute])


def in_out(model: ModelDef) -> InOut:
    """Return inputs and outputs as GE finds them in the graph, for files without the partition.

    The gears are in attributes of a Case operator, which are not read: such files are old.
    """
    ops = model.graphs[0].ops if model.graphs else ()
    inputs: dict[int, OmTensor] = {}
    for op in ops:
        if op.type in INPUT_TYPES and op.input_desc:
            index = op.attributes.get("index")
            slot = index if isinstance(index, int) else len(inputs)
            origin = op.attributes.get(ORIGIN_DIMS)
            inputs[slot] = _tensor(op.name, op.input_desc[0], origin)
    outputs = [tensor for op in ops if op.type == OUTPUT_TYPE for tensor in _outputs(op, model)]
    return InOut(tuple(inputs[slot] for slot in sorted(inputs)), tuple(outputs))


def _outputs(op: OpDef, model: ModelDef) -> Iterator[OmTensor]:
    """Named as hicann/ge:base/common/model/model_introduction.cc, ConstructOutputInfo."""
    names = model.attributes.get(OUT_NODES, ())
    for index, desc in enumerate(op.input_desc):
        edge = op.inputs[index] if index < len(op.inputs) else "?"
        source = op.src_name[index] if index < len(op.src_name) else edge.rsplit(":", 1)[0]
        number = op.src_index[index] if index < len(op.src_index) else 0
        name = f"output_{index}_{source}_{number}"
        if isinstance(names, tuple) and len(names) == len(op.input_desc):
            given = str(names[index])
            name = given if ":" in given else f"{given}:{number}"
        yield _tensor(name, desc, None)


def _tensor(name: str, desc: TensorDesc, origin: Attribute | None) -> OmTensor:
    shape = desc.shape
    if isinstance(origin, tuple) and all(isinstance(dim, int) for dim in origin):
        shape = tuple(int(dim) for dim in origin)
    size = desc.size or byte_size(desc.dtype, desc.shape)
    return OmTensor(name, desc.dtype, shape, size, desc.layout or "ND")


# Writing


def encode(model: ModelDef) -> bytes:
    """Return the partition; the same model gives the same bytes."""
    parts = [_text(1, model.name)]
    parts += [_nested(7, _graph(graph)) for graph in model.graphs]
    parts += _attributes(11, model.attributes)
    return b"".join(parts)


def _graph(graph: GraphDef) -> bytes:
    inputs = [op.name for op in graph.ops if op.type in INPUT_TYPES]
    outputs = [source for op in graph.ops if op.type == OUTPUT_TYPE for source in op.inputs]
    parts = [_text(1, graph.name)]
    parts += [_text(4, name) for name in inputs]
    parts += [_text(5, name) for name in outputs]
    parts += [_nested(6, _op(op, number)) for number, op in enumerate(graph.ops)]
    return b"".join(parts)


def _op(op: OpDef, number: int) -> bytes:
    parts = [_text(1, op.name), _text(2, op.type)]
    parts += [_text(5, source) for source in op.inputs]
    parts += _attributes(10, op.attributes)
    parts += [_varint_field(20, 1), _varint_field(21, number)]
    parts += [_text(24, name) for name in op.src_name]
    parts += [_packed(25, op.src_index)]
    parts += [_nested(33, _desc(desc)) for desc in op.input_desc]
    parts += [_nested(34, _desc(desc)) for desc in op.output_desc]
    parts += [_text(35, name) for name in op.subgraphs]
    return b"".join(parts)


def _desc(desc: TensorDesc) -> bytes:
    parts = [_text(1, desc.name)] if desc.name else []
    parts.append(_varint_field(2, proto_number(desc.dtype)))
    parts.append(_nested(3, _packed(1, desc.shape)))
    parts.append(_text(4, desc.layout))
    if desc.size:
        parts.append(_varint_field(10, desc.size))
    return b"".join(parts)


def _attributes(number: int, attributes: Mapping[str, Attribute]) -> list[bytes]:
    return [
        _nested(number, _text(1, name) + _nested(2, _attribute(value)))
        for name, value in sorted(attributes.items())
    ]


def _attribute(value: Attribute) -> bytes:
    if isinstance(value, bool):
        return _varint_field(5, int(value))
    if isinstance(value, int):
        return _varint_field(3, value)
    if isinstance(value, float):
        return _key(4, _FIXED32) + struct.pack("<f", value)
    if isinstance(value, str):
        return _text(2, value)
    texts = [item for item in value if isinstance(item, str)]
    if texts:
        body = b"".join(_text(2, item) for item in texts)
        return _nested(1, body + _varint_field(20, 1))
    numbers = [item for item in value if not isinstance(item, str)]
    return _nested(1, _packed(3, numbers) + _varint_field(20, 2))


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written as ten bytes
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint_field(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _varint(value)


def _nested(number: int, data: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(data)) + data


def _text(number: int, text: str) -> bytes:
    return _nested(number, text.encode())


def _packed(number: int, values: Sequence[int]) -> bytes:
    return _nested(number, b"".join(map(_varint, values))) if values else b""


# Reading

_Value = int | memoryview


def decode(data: memoryview, where: str) -> ModelDef:
    """Decode the partition.

    Args:
        data: The partition.
        where: The file, for messages.

    Raises:
        InputError: It is not a protobuf message.
    """
    try:
        fields = _fields(data)
        return ModelDef(
            name=_string(fields, 1),
            graphs=tuple(_read_graph(part) for part in _messages(fields, 7)),
            attributes=_read_attributes(fields, 11),
        )
    except _DamagedError as error:
        raise InputError(
            f"{where}: MODEL_DEF is damaged", str(error), "Build the .om again"
        ) from error


class _DamagedError(Exception):
    """The bytes are no message of the expected form."""


def _fields(data: memoryview) -> dict[int, list[_Value]]:
    """Every field of a message by number; fixed-width ones as their bytes."""
    found: dict[int, list[_Value]] = {}
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        value: _Value
        if wire == _VARINT:
            value, at = _read_varint(data, at)
        elif wire in (_BYTES, _FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
            if wire == _BYTES:
                size, at = _read_varint(data, at)
            if size > len(data) - at:
                raise _DamagedError(f"field {number} takes {size} bytes, {len(data) - at} are left")
            value = data[at : at + size]
            at += size
        else:
            raise _DamagedError(f"field {number} has the wire type {wire}")
        found.setdefault(number, []).append(value)
    return found


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for count in range(10):
        if at + count >= len(data):
            raise _DamagedError("the bytes end inside a number")
        byte = data[at + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value & ((1 << 64) - 1), at + count + 1
    raise _DamagedError("a number has more than ten bytes")


def _messages(fields: Mapping[int, list[_Value]], number: int) -> Iterator[memoryview]:
    for value in fields.get(number, ()):
        if isinstance(value, int):
            raise _DamagedError(f"field {number} is a number, not a message")
        yield value


def _strings(fields: Mapping[int, list[_Value]], number: int) -> tuple[str, ...]:
    return tuple(bytes(part).decode("utf-8", "replace") for part in _messages(fields, number))


def _string(fields: Mapping[int, list[_Value]], number: int) -> str:
    found = _strings(fields, number)
    return found[-1] if found else ""


def _integers(fields: Mapping[int, list[_Value]], number: int) -> tuple[int, ...]:
    """Repeated int64, packed or not."""
    found: list[int] = []
    for value in fields.get(number, ()):
        if isinstance(value, int):
            found.append(_signed(value))
            continue
        at = 0
        while at < len(value):
            item, at = _read_varint(value, at)
            found.append(_signed(item))
    return tuple(found)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _read_graph(data: memoryview) -> GraphDef:
    fields = _fields(data)
    return GraphDef(_string(fields, 1), tuple(_read_op(part) for part in _messages(fields, 6)))


def _read_op(data: memoryview) -> OpDef:
    fields = _fields(data)
    return OpDef(
        name=_string(fields, 1),
        type=_string(fields, 2),
        inputs=_strings(fields, 5),
        input_desc=tuple(_read_desc(part) for part in _messages(fields, 33)),
        output_desc=tuple(_read_desc(part) for part in _messages(fields, 34)),
        attributes=_read_attributes(fields, 10),
        src_name=_strings(fields, 24),
        src_index=_integers(fields, 25),
        subgraphs=_strings(fields, 35),
    )


def _read_desc(data: memoryview) -> TensorDesc:
    fields = _fields(data)
    shapes = list(_messages(fields, 3))
    dtype, size = _integers(fields, 2), _integers(fields, 10)
    return TensorDesc(
        dtype=proto_dtype(dtype[-1] if dtype else 0),
        shape=_integers(_fields(shapes[-1]), 1) if shapes else (),
        layout=_string(fields, 4),
        size=max(size[-1], 0) if size else 0,
        name=_string(fields, 1),
    )


def _read_attributes(fields: Mapping[int, list[_Value]], number: int) -> dict[str, Attribute]:
    found: dict[str, Attribute] = {}
    for entry in _messages(fields, number):
        pair = _fields(entry)
        for body in _messages(pair, 2):
            value = _read_attribute(_fields(body))
            if value is not None:
                found[_string(pair, 1)] = value
    return found


def _read_attribute(fields: Mapping[int, list[_Value]]) -> Attribute | None:
    if 3 in fields:
        return _integers(fields, 3)[-1] if _integers(fields, 3) else None
    if 5 in fields:
        return bool(fields[5][-1])
    if 4 in fields:
        raw = fields[4][-1]
        if isinstance(raw, int) or len(raw) != 4:
            raise _DamagedError("a float attribute has not four bytes")
        return float(struct.unpack("<f", raw)[0])
    if 2 in fields:
        return _string(fields, 2)
    for body in _messages(fields, 1):
        inner = _fields(body)
        if 3 in inner:
            return _integers(inner, 3)
        if 2 in inner:
            return _strings(inner, 2)
    return None
