"""MODEL_DEF: the graph as ge.proto.ModelDef, as far as it names inputs, outputs and operators.

The messages are those of an .air (`air.messages`). The records here are not: what atc has compiled
has fields that no .air has (sizes, the operators behind outputs), and a report needs no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

from omforge.air import messages
from omforge.air.ge_types import byte_size, proto_dtype, proto_number
from omforge.ir.errors import InputError
from omforge.om.inout import InOut, OmTensor

INPUT_TYPES = ("Data", "AippData", "AnnData", "RefData")
OUTPUT_TYPE = "NetOutput"
OUT_NODES = "attr_model_out_nodes_name"
ORIGIN_DIMS = "_mbatch_origin_input_dims"

Attribute = int | float | bool | str | tuple[int, ...] | tuple[str, ...]

_TEXTS, _INTEGERS = 1, 2
"""ListValue.val_type of the lists that are written."""


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
    message = messages.new("ModelDef")
    message.name = model.name
    for graph in model.graphs:
        _fill_graph(message.graph.add(), graph)
    _fill_attributes(message.attr, model.attributes)
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def _fill_graph(message: Any, graph: GraphDef) -> None:
    message.name = graph.name
    message.input.extend(op.name for op in graph.ops if op.type in INPUT_TYPES)
    for op in graph.ops:
        if op.type == OUTPUT_TYPE:
            message.output.extend(op.inputs)
    for number, op in enumerate(graph.ops):
        _fill_op(message.op.add(), op, number)


def _fill_op(message: Any, op: OpDef, number: int) -> None:
    message.name, message.type = op.name, op.type
    message.has_out_attr, message.id = True, number
    message.input.extend(op.inputs)
    message.src_name.extend(op.src_name)
    message.src_index.extend(op.src_index)
    message.subgraph_name.extend(op.subgraphs)
    for desc in op.input_desc:
        _fill_desc(message.input_desc.add(), desc)
    for desc in op.output_desc:
        _fill_desc(message.output_desc.add(), desc)
    _fill_attributes(message.attr, op.attributes)


def _fill_desc(message: Any, desc: TensorDesc) -> None:
    message.name, message.layout, message.size = desc.name, desc.layout, desc.size
    message.dtype = proto_number(desc.dtype)
    message.shape.SetInParent()  # a scalar's is there, and empty
    message.shape.dim.extend(desc.shape)


def _fill_attributes(target: Any, attributes: Mapping[str, Attribute]) -> None:
    for name, value in attributes.items():
        message = target[name]
        if isinstance(value, bool):
            message.b = value
        elif isinstance(value, int):
            message.i = value
        elif isinstance(value, float):
            message.f = value
        elif isinstance(value, str):
            message.s = value.encode()
        elif value and isinstance(value[0], str):
            message.list.val_type = _TEXTS
            message.list.s.extend(str(item).encode() for item in value)
        else:
            message.list.val_type = _INTEGERS
            message.list.i.extend(value)


# Reading


def decode(data: memoryview, where: str) -> ModelDef:
    """Decode the partition.

    Args:
        data: The partition.
        where: The file, for messages.

    Raises:
        InputError: It is not such a message, or holds no graph.
    """
    message = messages.new("ModelDef")
    try:
        message.ParseFromString(bytes(data))
    except DecodeError as error:
        raise _damaged(where, "its bytes are no protobuf message of GE's") from error
    if not message.graph:
        raise _damaged(where, "it holds no graph")
    return ModelDef(
        name=message.name,
        graphs=tuple(
            GraphDef(graph.name, tuple(_op(op) for op in graph.op)) for graph in message.graph
        ),
        attributes=_attributes(message.attr),
    )


def _damaged(where: str, why: str) -> InputError:
    return InputError(f"{where}: MODEL_DEF is damaged", why, "Build the .om again")


def _op(message: Any) -> OpDef:
    return OpDef(
        name=message.name,
        type=message.type,
        inputs=tuple(message.input),
        input_desc=tuple(_desc(desc) for desc in message.input_desc),
        output_desc=tuple(_desc(desc) for desc in message.output_desc),
        attributes=_attributes(message.attr),
        src_name=tuple(message.src_name),
        src_index=tuple(message.src_index),
        subgraphs=tuple(message.subgraph_name),
    )


def _desc(message: Any) -> TensorDesc:
    return TensorDesc(
        dtype=proto_dtype(message.dtype),
        shape=tuple(message.shape.dim),
        layout=message.layout,
        size=max(message.size, 0),
        name=message.name,
    )


def _attributes(found: Any) -> dict[str, Attribute]:
    read = {name: _attribute(found[name]) for name in sorted(found)}
    return {name: value for name, value in read.items() if value is not None}


def _attribute(message: Any) -> Attribute | None:
    kind = message.WhichOneof("value")
    if kind in ("i", "f", "b"):
        value: Attribute = getattr(message, kind)
        return value
    if kind == "s":
        return _text(message.s)
    if kind != "list":
        return None
    if message.list.s:
        return tuple(_text(item) for item in message.list.s)
    if message.list.i or message.list.val_type == _INTEGERS:
        return tuple(message.list.i)
    return () if message.list.val_type == _TEXTS else None


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
