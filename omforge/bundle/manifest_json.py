"""JSON to dataclasses, every value checked against its annotation; what is wrong is named.

The path of a field says where it is: `buckets[0].inputs[2].shape[1]`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, cast

from omforge.ir.errors import InputError


def wrong(field: str, why: str, next_step: str = "Build the bundle again") -> InputError:
    """Return the error of a field."""
    return InputError(field, why, next_step)


def positive(field: str, value: int) -> None:
    """Refuse a number that is not 1 or more."""
    if value < 1:
        raise wrong(field, f"is {value}, must be 1 or more")


def unique(field: str, names: list[str]) -> None:
    """Refuse names of which one is there twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise wrong(field, f"names {', '.join(map(repr, twice))} more than once")


def refuse_constant(name: str) -> float:
    """Refuse NaN and infinity, which Python's reader takes and JSON has not."""
    raise ValueError(f"{name} is not a number that JSON knows")


def is_map(data: object) -> bool:
    """Whether parsed JSON is an object."""
    return isinstance(data, dict)


def decode(annotation: Any, data: object, where: str) -> object:
    """Turn parsed JSON into the annotated type; `where` is the field's path for messages."""
    if annotation is Any:
        return data
    origin: object = typing.get_origin(annotation)
    arguments: tuple[Any, ...] = typing.get_args(annotation)
    if origin is types.UnionType:
        return _decode_union(arguments, data, where)
    if origin is Literal:
        if data not in arguments:
            raise wrong(where, f"is {data!r}, must be one of {', '.join(map(repr, arguments))}")
        return data
    if origin is tuple:
        return _decode_tuple(arguments, data, where)
    if origin is dict:
        entries = as_map(data, where)
        return {
            key: decode(arguments[1], item, f"{where}[{key!r}]") for key, item in entries.items()
        }
    if dataclasses.is_dataclass(annotation):
        return _decode_dataclass(cast("type[object]", annotation), data, where)
    return _decode_scalar(annotation, data, where)


def _decode_union(arguments: tuple[Any, ...], data: object, where: str) -> object:
    if data is None and types.NoneType in arguments:
        return None
    given = [a for a in arguments if a is not types.NoneType]
    if len(given) == 1 and dataclasses.is_dataclass(given[0]):
        return _decode_dataclass(cast("type[object]", given[0]), data, where)
    for argument in arguments:
        if argument is not types.NoneType and type(data) is argument:
            return data
        if dataclasses.is_dataclass(argument) and isinstance(data, dict):
            return _decode_dataclass(
                cast("type[object]", argument), cast("dict[str, object]", data), where
            )
    names = " or ".join("null" if a is types.NoneType else a.__name__ for a in arguments)
    raise wrong(where, f"is {_kind(data)}, must be {names}")


def _decode_tuple(arguments: tuple[Any, ...], data: object, where: str) -> object:
    if not isinstance(data, list):
        raise wrong(where, f"is {_kind(data)}, must be a list")
    items = cast("list[object]", data)
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(items)
    if len(arguments) != len(items):
        raise wrong(where, f"has {len(items)} items, must have {len(arguments)}")
    return tuple(
        decode(argument, item, f"{where}[{index}]")
        for index, (argument, item) in enumerate(zip(arguments, items, strict=True))
    )


def _decode_dataclass(cls: type[object], data: object, where: str) -> object:
    entries = as_map(data, where or "manifest")
    hints = typing.get_type_hints(cls)
    prefix = f"{where}." if where else ""
    optional = {
        field.name
        for field in dataclasses.fields(cast("Any", cls))
        if {field.default, field.default_factory} != {dataclasses.MISSING}
    }
    for name in hints:
        if name not in entries and name not in optional:
            raise wrong(prefix + name, "is missing")
    for name in entries:
        if name not in hints:
            raise wrong(prefix + name, f"is no field of {cls.__name__}")
    return cls(
        **{
            name: decode(hint, entries[name], prefix + name)
            for name, hint in hints.items()
            if name in entries
        }
    )


def _decode_scalar(annotation: Any, data: object, where: str) -> object:
    if annotation is float and type(data) is int:
        return float(data)
    # `type(...) is`, because bool is a subclass of int and `true` is no number.
    if type(data) is not annotation:
        raise wrong(where, f"is {_kind(data)}, must be {annotation.__name__}")
    return data


def as_map(data: object, where: str) -> dict[str, object]:
    """Return parsed JSON that is an object; raise InputError where it is none."""
    if not isinstance(data, dict):
        raise wrong(where, f"is {_kind(data)}, must be an object")
    return cast("dict[str, object]", data)


def _kind(data: object) -> str:
    return "null" if data is None else f"{data!r} ({type(data).__name__})"
