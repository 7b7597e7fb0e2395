"""Reads and writes .air files: bare bytes of ge.proto.ModelDef, with no magic and no header.

The same graph gives the same bytes: fields by number, maps by key. Source of the loader:
hicann/ge:graph_metadef/graph/normal_graph/model.cc (LoadFromFile).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from google.protobuf.message import DecodeError

from omforge.air import messages
from omforge.air.ge_types import ge_dtype, ge_number, proto_dtype, proto_number
from omforge.air.graph import LIST_TYPES, Air, Attr, Desc, Graph, Item, Op, Tensor
from omforge.ir.errors import InputError
from omforge.ir.weights import replacing, write_error

MOST_OPERATORS = 1_000_000
"""A file with more is damaged, or made to fill the memory of whoever reads it."""

_VAL_TYPES = {kind: number for number, kind in LIST_TYPES.items()}


def read_air(path: str | os.PathLike[str]) -> Air:
    """Read a file.

    Raises:
        InputError: It cannot be read, or is no GE graph.
    """
    file = Path(path)
    try:
        if file.stat().st_size > messages.LIMIT:
            raise InputError(
                f"{file} has more than 2 GiB",
                "protobuf reads no such message, and atc neither (E10041)",
                "Keep the weights outside: FileConstant takes them from a file",
            )
        data = file.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {file}", str(error.strerror or error), "Check the path"
        ) from error
    return decode(data, str(file))


def decode(data: bytes, where: str) -> Air:
    """Decode the bytes of a file.

    Raises:
        InputError: They are no GE graph; `where` is what the message calls them.
    """
    message = messages.new("ModelDef")
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise _no_graph(where, "its bytes are no protobuf message of GE's") from error
    if not message.graph:
        raise _no_graph(where, "it holds no graph")
    count = sum(len(graph.op) for graph in message.graph)
    if count > MOST_OPERATORS:
        raise _no_graph(where, f"it has {count} operators, and one of a model has some thousands")
    return _air(message)


def _no_graph(where: str, why: str) -> InputError:
    return InputError(f"{where} is no GE graph", why, "Give a file that ends in .air, whole")


def encode(air: Air) -> bytes:
    """Return the bytes of a file; the same graph gives the same."""
    message = _new("ModelDef", air.rest)
    message.name, message.version = air.name, air.version
    for graph in air.graphs:
        _fill_graph(message.graph.add(), graph)
    _fill_attributes(message.attr, air.attributes)
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def write_air(air: Air, path: str | os.PathLike[str]) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: It would have more than 2 GiB.
        OmforgeError: It cannot be written.
    """
    file = Path(path)
    data = encode(air)
    if len(data) > messages.LIMIT:
        raise InputError(
            f"{file} would have more than 2 GiB",
            "neither protobuf nor atc reads such a file",
            "Keep the weights outside: FileConstant takes them from a file",
        )
    try:
        with replacing(file) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise write_error(file, error) from error


# From messages


def _air(message: Any) -> Air:
    graphs = tuple(_graph(graph) for graph in message.graph)
    attributes = _attributes(message.attr)
    known = (message.name, message.version)
    rest = _rest(message, "name", "version", "graph", "attr")
    return Air(known[0], graphs, known[1], attributes, rest)


def _graph(message: Any) -> Graph:
    return Graph(
        name=message.name,
        ops=tuple(_op(op) for op in message.op),
        inputs=tuple(message.input),
        outputs=tuple(message.output),
        attributes=_attributes(message.attr),
        rest=_rest(message, "name", "op", "input", "output", "attr"),
    )


def _op(message: Any) -> Op:
    return Op(
        name=message.name,
        type=message.type,
        inputs=tuple(message.input),
        input_desc=tuple(_desc(desc) for desc in message.input_desc),
        output_desc=tuple(_desc(desc) for desc in message.output_desc),
        attributes=_attributes(message.attr),
        rest=_rest(message, "name", "type", "input", "input_desc", "output_desc", "attr"),
    )


def _desc(message: Any) -> Desc:
    return Desc(
        name=message.name,
        dtype=proto_dtype(message.dtype),
        shape=tuple(message.shape.dim) if message.HasField("shape") else None,
        layout=message.layout,
        attributes=_attributes(message.attr),
        rest=_rest(message, "name", "dtype", "shape", "layout", "attr"),
    )


def _rest(message: Any, *known: str) -> bytes:
    for name in known:
        message.ClearField(name)
    data: bytes = message.SerializeToString(deterministic=True)
    return data


def _attributes(found: Any) -> dict[str, Attr]:
    return {name: _attribute(found[name]) for name in sorted(found)}


def _attribute(message: Any) -> Attr:
    kind = message.WhichOneof("value")
    if kind is None:
        return Attr("none")
    if kind == "list":
        return _list(message)
    if kind not in _VAL_TYPES:
        return Attr("raw", message.SerializeToString(deterministic=True))
    return Attr(kind, _item(kind, getattr(message, kind)))


def _list(message: Any) -> Attr:
    value = message.list
    filled = [field.name for field, _ in value.ListFields() if field.name != "val_type"]
    stated = LIST_TYPES.get(value.val_type)
    kind = filled[0] if filled else stated
    if kind is None or kind not in _VAL_TYPES or len(filled) > 1 or stated not in (None, kind):
        return Attr("raw", message.SerializeToString(deterministic=True))
    items = tuple(_item(kind, item) for item in getattr(value, kind))
    return Attr(cast("Any", kind), items=items, typed=value.val_type != 0)


def _item(kind: str, value: Any) -> Item:
    if kind == "s":
        return cast("bytes", value).decode("utf-8", "surrogateescape")
    if kind == "dt":
        return ge_dtype(value)
    if kind == "td":
        return _desc(value)
    if kind == "t":
        desc = _desc(value.desc)
        return Tensor(desc, value.data)
    return cast("Item", value)


# To messages


def _new(name: str, rest: bytes) -> Any:
    message = messages.new(name)
    message.MergeFromString(rest)
    return message


def _fill_graph(message: Any, graph: Graph) -> None:
    message.MergeFromString(graph.rest)
    message.name = graph.name
    message.input.extend(graph.inputs)
    message.output.extend(graph.outputs)
    for op in graph.ops:
        _fill_op(message.op.add(), op)
    _fill_attributes(message.attr, graph.attributes)


def _fill_op(message: Any, op: Op) -> None:
    message.MergeFromString(op.rest)
    message.name, message.type = op.name, op.type
    message.input.extend(op.inputs)
    for desc in op.input_desc:
        _fill_desc(message.input_desc.add(), desc)
    for desc in op.output_desc:
        _fill_desc(message.output_desc.add(), desc)
    _fill_attributes(message.attr, op.attributes)


def _fill_desc(message: Any, desc: Desc) -> None:
    message.MergeFromString(desc.rest)
    message.name, message.layout = desc.name, desc.layout
    message.dtype = proto_number(desc.dtype)
    if desc.shape is not None:
        message.shape.SetInParent()  # a scalar's is there, and empty
        message.shape.dim.extend(desc.shape)
    _fill_attributes(message.attr, desc.attributes)


def _fill_attributes(target: Any, attributes: Mapping[str, Attr]) -> None:
    for name, attribute in attributes.items():
        _fill_attribute(target[name], attribute)


def _fill_attribute(message: Any, attribute: Attr) -> None:
    kind = attribute.kind
    if kind == "raw":
        message.MergeFromString(attribute.value)
    elif attribute.items is not None:
        value = message.list
        value.SetInParent()
        if attribute.typed:
            value.val_type = _VAL_TYPES[cast("Any", kind)]
        for item in attribute.items:
            _add_item(getattr(value, kind), kind, item)
    elif kind == "td":
        _fill_desc(message.td, cast("Desc", attribute.value))
    elif kind == "t":
        _fill_tensor(message.t, cast("Tensor", attribute.value))
    elif kind != "none":
        setattr(message, kind, _plain(kind, attribute.value))


def _add_item(target: Any, kind: str, item: Item) -> None:
    if kind == "td":
        _fill_desc(target.add(), cast("Desc", item))
    elif kind == "t":
        _fill_tensor(target.add(), cast("Tensor", item))
    else:
        target.append(_plain(kind, item))


def _fill_tensor(message: Any, tensor: Tensor) -> None:
    _fill_desc(message.desc, tensor.desc)
    message.data = tensor.data


def _plain(kind: str, value: Item | None) -> Any:
    if kind == "s":
        return cast("str", value).encode("utf-8", "surrogateescape")
    if kind == "dt":
        return ge_number(cast("str", value))
    return value
