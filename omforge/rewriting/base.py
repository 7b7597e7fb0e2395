"""What every pass is, and its options: typed fields that text can set."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from omforge import ir


@dataclass(frozen=True)
class Pass:
    """One rewriting step over a whole model. Its fields are its options.

    A pass may break the model's rules while it runs, but leaves a valid model behind.
    """

    name: ClassVar[str]
    """Kebab-case; the module and the class carry the same words."""

    changes_interface: ClassVar[bool] = False
    """Whether inputs or outputs change, so that the model cannot be compared with itself before."""

    changes_numbers: ClassVar[bool] = False
    """Whether the model computes something else on purpose, so that it is not compared either."""

    def run(self, model: ir.Model) -> int:
        """Rewrite `model` in place.

        Returns:
            The number of rewrites; 0 means that the model is untouched.
        """
        raise NotImplementedError(f"{type(self).__name__}.run")

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the class's or, without one, the module's docstring."""
        module = inspect.getmodule(cls)
        own = cls.__dict__.get("__doc__")
        # dataclass() writes the signature where a class has no docstring.
        generated = own is None or own.startswith(f"{cls.__name__}(")
        text = (module.__doc__ if module else None) if generated else own
        return inspect.cleandoc(text or "").partition("\n")[0]

    def __str__(self) -> str:
        changed = [
            f"{name}={_text(getattr(self, name))}"
            for name, option in options(type(self)).items()
            if getattr(self, name) != option.default
        ]
        return f"{self.name}{{{' '.join(changed)}}}" if changed else self.name


@dataclass(frozen=True)
class Option:
    """A field of a pass that text can set: its name, type, default and that type in words."""

    name: str
    type: Any
    default: Any
    words: str

    @property
    def required(self) -> bool:
        """Whether the pass cannot be made without it."""
        return self.default is dataclasses.MISSING


def options(pass_type: type[Pass]) -> dict[str, Option]:
    """Return the options of a pass by name, in the order of its fields."""
    hints = typing.get_type_hints(pass_type)
    found: dict[str, Option] = {}
    for entry in dataclasses.fields(pass_type):
        words = _words(hints[entry.name])
        if not entry.init or words is None:
            continue  # a function, say: set by Python, not by text
        default = entry.default
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        found[entry.name] = Option(entry.name, hints[entry.name], default, words)
    return found


def require_options(pass_type: type[Pass]) -> None:
    """Say why text cannot make a pass, or how it would be misread.

    Raises:
        TypeError: A field has no type that text can give and no default, or is no option at all.
    """
    known = options(pass_type)
    for entry in dataclasses.fields(pass_type):
        without = entry.default is entry.default_factory is dataclasses.MISSING
        if entry.init and without and entry.name not in known:
            raise TypeError(
                f"its field {entry.name!r} has no default, and no type that text can give"
            )
    if "__dataclass_fields__" not in vars(pass_type):
        fields = {entry.name for entry in dataclasses.fields(pass_type)}
        written = inspect.get_annotations(pass_type).items()
        lost = [name for name, kind in written if "ClassVar" not in str(kind)]
        if set(lost) - fields:
            raise TypeError(f"its field {lost[0]!r} is no option: add @dataclass(frozen=True)")


_SCALARS: Mapping[Any, str] = {int: "INT", float: "FLOAT", bool: "true|false", str: "TEXT"}
_BOOLS = {"true": True, "false": False}


def _words(kind: Any) -> str | None:
    """How a value of a type is written, or None for a type that text cannot give."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in _SCALARS:
        return _SCALARS[kind]
    if origin is Literal and all(type(choice) in (str, int) for choice in arguments):
        return "|".join(map(str, arguments))
    if origin is tuple and len(arguments) == 2 and arguments[1] is ...:
        element = _words(arguments[0])
        return f"{element},{element},..." if element else None
    if (
        origin in (types.UnionType, typing.Union)
        and len(arguments) == 2
        and arguments[1] is type(None)
    ):
        element = _words(arguments[0])
        return f"{element}|none" if element else None
    return None


def convert(text: str, kind: Any) -> Any:
    """Read a value of a type that `_words` knows; ValueError or KeyError if the text is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        # By text, as a choice may be a number.
        return {str(choice): choice for choice in arguments}[text]
    if origin is tuple:
        return tuple(convert(part, arguments[0]) for part in text.split(",") if part)
    if arguments:
        return None if text == "none" else convert(text, arguments[0])
    if kind is bool:
        if text not in _BOOLS:
            raise ValueError(text)
        return _BOOLS[text]
    return kind(text)


def _text(value: Any) -> str:
    """The text that `convert` reads back as `value`."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(_text(element) for element in typing.cast("tuple[Any, ...]", value))
    text = str(value)
    return f'"{text}"' if not text or set(text) & set(' {}"\n\t') else text
