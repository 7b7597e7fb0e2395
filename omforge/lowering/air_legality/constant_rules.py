"""Rules for constants: inside the file (Const) and outside of it (FileConstant)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from omforge.air.ge_types import byte_size
from omforge.air.graph import Attr, Desc, Op, Tensor
from omforge.air.show import typed
from omforge.lowering.air_legality.subject import AirSubject, Call
from omforge.lowering.legality.subject import Finding, Rule

CONST = ("Const", "Constant")


def constants_have_a_value(subject: AirSubject) -> Iterator[Finding]:
    """A Const has an attribute `value` of kind tensor, and reads nothing."""
    for call in _constants(subject):
        if any(call.op.inputs):
            yield Finding(call.where, "a constant reads something", "", "connect nothing to it")
        elif stored(call.op) is None:
            given = call.op.attributes.get("value")
            yield Finding(
                call.where,
                "it has no value" if given is None else "its value is no tensor",
                "a constant is the tensor `value`",
                "store it as a tensor",
            )


def constants_are_as_long_as_they_say(subject: AirSubject) -> Iterator[Finding]:
    """The bytes of a constant are as many as its shape and dtype ask for."""
    for call in _constants(subject):
        value = stored(call.op)
        if value is None or (not value.data and "location" in call.op.attributes):
            continue
        size = _size(value.desc)
        if size is None:
            yield Finding(
                call.where,
                f"the constant is {typed(value.desc)}",
                "its size cannot be told",
                "state dtype and shape",
            )
        elif size != len(value.data):
            yield Finding(
                call.where,
                f"the constant has {len(value.data)} bytes",
                f"{typed(value.desc)} has {size}",
                "store the whole tensor, little endian",
            )


def constants_are_described_alike(subject: AirSubject) -> Iterator[Finding]:
    """The output of a constant is described as its value."""
    for call in _constants(subject):
        value = stored(call.op)
        if value is None or not call.op.output_desc:
            continue
        inner, outer = value.desc, call.op.output_desc[0]
        if inner.dtype != outer.dtype or (inner.shape or ()) != (outer.shape or ()):
            yield Finding(
                call.where,
                f"the constant is {typed(inner)}, its output {typed(outer)}",
                "",
                "describe them alike",
            )


def stored(op: Op) -> Tensor | None:
    """The tensor of a Const; None where it has none."""
    attribute = op.attributes.get("value")
    value = None if attribute is None else attribute.value
    return value if isinstance(value, Tensor) else None


def files_of_constants_are_named(subject: AirSubject) -> Iterator[Finding]:
    """A FileConstant has shape, dtype, and a path: file_path, or location, offset and length."""
    for call in subject.calls:
        if call.op.type != "FileConstant":
            continue
        attributes = call.op.attributes
        faults = [
            f"{name} is no {word}"
            for name, kind, is_list, word in (
                ("shape", "i", True, "typed list of int"),
                ("dtype", "dt", False, "dtype"),
            )
            if not _is(attributes.get(name), kind, is_list)
        ]
        paths = [name for name in ("file_path", "location") if _text(attributes.get(name))]
        if len(paths) != 1:
            faults.append("file_path and location are both there" if paths else "it names no file")
        faults += [
            f"{name} is no int"
            for name in ("offset", "length")
            if name in attributes and not _is(attributes[name], "i", False)
        ]
        for fault in faults:
            yield Finding(
                call.where,
                f"as a FileConstant, {fault}",
                "shape is a ListInt, dtype a Type; the bytes are at file_path, or at location "
                "from offset on",
                "write those attributes",
            )
        if not faults and (
            attributes["dtype"].value != _output(call).dtype
            or attributes["shape"].items != (_output(call).shape or ())
        ):
            yield Finding(
                call.where,
                "its shape and dtype are not those of its output",
                f"the output is {typed(_output(call))}",
                "describe them alike",
            )


def files_of_weights_hold_them(subject: AirSubject) -> Iterator[Finding]:
    """The file of a constant exists, and is long enough for it."""
    sizes: dict[Path, int | str] = {}
    for call, location, offset, length in _stored_outside(subject):
        # Relative paths start at the folder of the file, where atc is run from.
        path = subject.folder / location
        if path not in sizes:
            sizes[path] = _file_size(path)
        size = sizes[path]
        if isinstance(size, str):
            yield Finding(call.where, f"the file {location} {size}", "", "put the weights there")
        elif offset < 0 or offset + length > size:
            yield Finding(
                call.where,
                f"the constant lies at {offset} to {offset + length} of {location}",
                f"the file has {size} bytes",
                "write the file again, whole",
            )


def weights_are_as_long_as_they_say(subject: AirSubject) -> Iterator[Finding]:
    """`length` is what shape and dtype ask for."""
    for call, _, _, length in _stored_outside(subject):
        desc = _outside_desc(call)
        size = None if desc is None else _size(desc)
        if desc is not None and size is not None and size != length:
            yield Finding(
                call.where,
                f"the length is {length}",
                f"{typed(desc)} has {size} bytes",
                "write the length of the tensor, or none",
            )


def _constants(subject: AirSubject) -> Iterator[Call]:
    return (call for call in subject.calls if call.op.type in CONST)


def _stored_outside(subject: AirSubject) -> Iterator[tuple[Call, str, int, int]]:
    """Each constant outside of the file: where, from which byte on, and how many."""
    for call in subject.calls:
        attributes = call.op.attributes
        location = _text(attributes.get("file_path")) or _text(attributes.get("location"))
        value = stored(call.op)
        separated = call.op.type in CONST and value is not None and not value.data
        if location and (separated or call.op.type == "FileConstant"):
            desc = _outside_desc(call)
            size = (desc and _size(desc)) or 0
            offset = 0 if separated else _integer(attributes.get("offset"))
            yield call, location, offset, _integer(attributes.get("length")) or size


def _outside_desc(call: Call) -> Desc | None:
    value = stored(call.op)
    if call.op.type in CONST:
        return None if value is None else value.desc
    shape, dtype = call.op.attributes.get("shape"), call.op.attributes.get("dtype")
    if not _is(shape, "i", True) or not _is(dtype, "dt", False):
        return None
    assert shape is not None
    assert dtype is not None
    dims = tuple(item for item in shape.items or () if isinstance(item, int))
    return Desc(dtype=str(dtype.value), shape=dims)


def _output(call: Call) -> Desc:
    return call.op.output_desc[0] if call.op.output_desc else Desc()


def _is(attribute: Attr | None, kind: str, is_list: bool) -> bool:
    if attribute is None or attribute.kind != kind:
        return False
    return (attribute.items is not None) == is_list and attribute.typed


def _text(attribute: Attr | None) -> str:
    value = None if attribute is None else attribute.value
    return (
        value if isinstance(value, str) and attribute is not None and attribute.kind == "s" else ""
    )


def _integer(attribute: Attr | None) -> int:
    value = None if attribute is None else attribute.value
    return value if isinstance(value, int) else 0


def _size(desc: Desc) -> int | None:
    """The bytes of a dense tensor; None where dtype or shape do not say."""
    shape = desc.shape or ()
    if any(dim < 0 for dim in shape) or not byte_size(desc.dtype, (1,)):
        return None
    return byte_size(desc.dtype, shape)


def _file_size(path: Path) -> int | str:
    """The bytes of a file, or what is wrong with it."""
    try:
        if not path.is_file():
            return "is no file" if path.exists() else "does not exist"
        return os.stat(path).st_size
    except (OSError, ValueError) as error:
        return f"cannot be looked at: {getattr(error, 'strerror', None) or error}"


_TENSOR = "hicann/ge:graph_metadef/graph/normal_graph/ge_tensor.cc"
_OUTSIDE = "hicann/ge:base/common/file_constant_utils/file_constant_utils.cc"

RULES = (
    Rule("air-const-value", "E10041, or EZ9999", _TENSOR, constants_have_a_value),
    Rule(
        "air-const-bytes",
        "E19999: the size of the data",
        _TENSOR,
        constants_are_as_long_as_they_say,
    ),
    Rule(
        "air-const-desc",
        "inference goes by one of them and memory by the other",
        _TENSOR,
        constants_are_described_alike,
        certainty="inferred",
    ),
    Rule("air-weight-attributes", "E10041, or E19999", _OUTSIDE, files_of_constants_are_named),
    Rule(
        "air-weight-files",
        "E10041, or E19999",
        _OUTSIDE,
        files_of_weights_hold_them,
        certainty="seen",
    ),
    Rule("air-weight-bytes", "E19999, or other weights", _OUTSIDE, weights_are_as_long_as_they_say),
)
