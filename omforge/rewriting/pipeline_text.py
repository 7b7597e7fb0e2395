"""Pipelines written as text.

A pipeline is a comma-separated list of passes with options in braces::

    canonicalize,fuse-rms-norm,bucket-shapes{context=2048 prefill=1,128},my_package.module:MyPass

Options are separated by spaces and typed by the fields of the pass. The name of a pipeline may
stand wherever the name of a pass may, and expands in place.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from omforge.ir.errors import InputError, OmforgeError
from omforge.rewriting.base import Option, Pass, convert, options
from omforge.rewriting.pipeline import Pipeline


def parse_pipeline(
    text: str,
    registry: Mapping[str, type[Pass]],
    pipelines: Mapping[str, str] | None = None,
) -> Pipeline:
    """Read a pipeline from text.

    Args:
        text: As the module's docstring shows.
        registry: Passes by name.
        pipelines: Texts of named pipelines, which expand where they are named.

    Raises:
        InputError: An unknown pass or option, a value that its type does not admit, an open brace;
            with the position, and the nearest name or the names there are.
    """
    return Pipeline(tuple(_Parser(text, registry, pipelines or {}, ()).passes()))


class _Parser:
    """Recursive descent over one text; `at` is the next character."""

    def __init__(
        self,
        text: str,
        registry: Mapping[str, type[Pass]],
        pipelines: Mapping[str, str],
        inside: tuple[str, ...],
    ) -> None:
        self.text = text
        self.registry = registry
        self.pipelines = pipelines
        self.inside = inside  # the named pipelines being expanded, outermost first
        self.at = 0

    def passes(self) -> list[Pass]:
        """Parse all of the text."""
        found: list[Pass] = []
        self._blanks()
        while self.at < len(self.text):
            found += self._item()
            self._blanks()
            if self.at == len(self.text):
                break
            if self.text[self.at] != ",":
                self._fail(
                    self.at,
                    f"{self.text[self.at]!r} follows a pass",
                    "Write a comma between passes",
                )
            self.at += 1
            self._blanks()
        return found

    def _item(self) -> list[Pass]:
        start = self.at
        name = self._until(",{ \n\t")
        if not name:
            self._fail(start, "a pass name is missing", "Remove the extra comma or name a pass")
        if name in self.pipelines:
            return self._expand(name, start)
        pass_type = self.registry.get(name)
        if pass_type is None:
            self._fail(
                start,
                f"there is no pass {name!r}",
                _nearest(name, [*self.registry, *self.pipelines], "Passes"),
            )
        return [self._make(pass_type, start)]

    def _expand(self, name: str, start: int) -> list[Pass]:
        if name in self.inside:
            chain = " -> ".join((*self.inside, name))
            self._fail(start, f"pipeline {name!r} contains itself", f"Break the cycle {chain}")
        if self._peek("{"):
            self._fail(self.at, f"{name!r} is a pipeline", "Give options to the passes in it")
        inner = (*self.inside, name)
        return _Parser(self.pipelines[name], self.registry, self.pipelines, inner).passes()

    def _make(self, pass_type: type[Pass], start: int) -> Pass:
        known = options(pass_type)
        given: dict[str, Any] = {}
        if self._peek("{"):
            opened, self.at = self.at, self.at + 1
            self._blanks()
            while not self._peek("}"):
                if self.at == len(self.text):
                    self._fail(opened, "this brace is not closed", "Add } after the last option")
                self._option(pass_type, known, given)
                self._blanks()
            self.at += 1
        missing = [name for name, option in known.items() if option.required and name not in given]
        if missing:
            self._fail(
                start, f"{pass_type.name} needs {', '.join(missing)}", _listed(pass_type, known)
            )
        try:
            return pass_type(**given)
        except (TypeError, ValueError) as error:  # of its own __post_init__
            self._fail(start, f"{pass_type.name}: {error}", _listed(pass_type, known))
        except OmforgeError:
            raise
        except Exception as error:  # of a pattern that is not written, or fails
            kind = f"{pass_type.__module__}:{pass_type.__qualname__}"
            what = f"{type(error).__name__}: {error}".removesuffix(": ")
            self._fail(start, f"{kind} cannot be made: {what}", "Mend it, or tell who made it")

    def _option(
        self, pass_type: type[Pass], known: Mapping[str, Option], given: dict[str, Any]
    ) -> None:
        start = self.at
        name = self._until("= }").replace("-", "_")
        option = known.get(name)
        if option is None:
            advice = _nearest(name, list(known), "Options") if known else "Leave the braces out"
            self._fail(start, f"{pass_type.name} has no option {name!r}", advice)
        if name in given:
            self._fail(start, f"option {name!r} is given twice", "Give it once")
        if not self._peek("="):
            self._fail(self.at, f"option {name!r} has no value", f"Write {name}={option.words}")
        self.at += 1
        start = self.at
        text = self._value()
        try:
            given[name] = convert(text, option.type)
        except (ValueError, KeyError):
            self._fail(start, f"{text!r} is no value for {name!r}", f"Write {name}={option.words}")

    def _value(self) -> str:
        if not self._peek('"'):
            return self._until(" }\n\t")
        start = self.at
        end = self.text.find('"', start + 1)
        if end < 0:
            self._fail(start, "this quote is not closed", 'Add " after the value')
        self.at = end + 1
        return self.text[start + 1 : end]

    def _until(self, stops: str) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in stops:
            self.at += 1
        return self.text[start : self.at]

    def _blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def _peek(self, character: str) -> bool:
        return self.text.startswith(character, self.at)

    def _fail(self, at: int, why: str, next_step: str) -> NoReturn:
        within = f"pipeline {self.inside[-1]!r}" if self.inside else "pipeline"
        raise InputError(f"{within} {self.text!r}, column {at + 1}", why, next_step)


def _nearest(name: str, names: Sequence[str], kind: str) -> str:
    close = get_close_matches(name, names, n=1)
    listed = f"{kind}: {', '.join(sorted(names))}"
    return f"Did you mean {close[0]!r}? {listed}" if close else listed


def _listed(pass_type: type[Pass], known: Mapping[str, Option]) -> str:
    return f"Write {pass_type.name}{{{' '.join(f'{o.name}={o.words}' for o in known.values())}}}"
