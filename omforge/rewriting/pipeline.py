"""Passes, and pipelines of them written as text.

A pipeline is a comma-separated list of passes with options in braces::

    canonicalize,fuse-rms-norm,bucket-shapes{context=2048 prefill=1,128}

Options are separated by spaces and typed by the fields of the pass. The name of a pipeline may
stand wherever the name of a pass may, and expands in place.
"""

import dataclasses
import inspect
import logging
import time
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

from omforge import ir
from omforge.ir.errors import CheckError, InputError
from omforge.rewriting.fingerprint import Fingerprint, fingerprint

if TYPE_CHECKING:
    from omforge.rewriting.instruments import Instrument

log = logging.getLogger(__name__)


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


@dataclass
class PassRun:
    """What one pass of a pipeline did. Instruments read it, and may add to it.

    Attributes:
        index: Position in the pipeline, from 1.
        step: The pass.
        count: Passes of the pipeline.
        rewrites: What it returned.
        nodes_before: Nodes of the model, subgraphs included, when it started.
        nodes_after: The same when it ended.
        seconds: Time in the pass itself, without instruments.
        skipped: An instrument kept it from running.
        max_abs_diff: Largest difference of any output, where an instrument compared.
        note: A remark of an instrument ("not compared: ...").
    """

    index: int
    step: Pass
    count: int = 1
    rewrites: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    skipped: bool = False
    max_abs_diff: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The name of the pass."""
        return self.step.name

    @property
    def changed(self) -> bool:
        """Whether the pass reported a rewrite."""
        return self.rewrites > 0


@dataclass(frozen=True)
class PipelineResult:
    """What every pass of a pipeline did, in order."""

    passes: tuple[PassRun, ...]

    @property
    def rewrites(self) -> int:
        """All rewrites together."""
        return sum(run.rewrites for run in self.passes)


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `str()` gives text that parses back to an equal pipeline."""

    passes: tuple[Pass, ...] = field(default=())

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.passes)

    def run(
        self, model: ir.Model, instruments: "Sequence[Instrument] | None" = None
    ) -> PipelineResult:
        """Run the passes on `model`, in place.

        Args:
            model: The model.
            instruments: What watches each pass, called in this order; the model is verified after
                each pass if this is None, and nothing watches if it is empty.

        Raises:
            OmforgeError: A pass or an instrument failed, or a pass that is watched changed the
                model and returned 0; the model is then in an undefined state.
        """
        if instruments is None:
            from omforge.rewriting.instruments import VerifyEach  # it needs Pass from this module

            instruments = (VerifyEach(),)
        done: list[PassRun] = []
        nodes = _count(model)
        state = fingerprint(model) if instruments else None
        for index, step in enumerate(self.passes, 1):
            count = len(self.passes)
            run = PassRun(index, step, count=count, nodes_before=nodes, nodes_after=nodes)
            done.append(run)
            # A list, not a generator: every instrument is asked, also after one has said no.
            run.skipped = not all([watch.should_run(run) for watch in instruments])
            if not run.skipped:
                state = _run_watched(run, model, instruments, state)
                nodes = run.nodes_after
        return PipelineResult(tuple(done))


def _run_watched(
    run: PassRun,
    model: ir.Model,
    instruments: "Sequence[Instrument]",
    state: Fingerprint | None,
) -> Fingerprint | None:
    """Run one pass; `state` is the model before it, and what is returned the model after it."""
    try:
        for watch in instruments:
            watch.before(run, model)
        start = time.perf_counter()
        run.rewrites = run.step.run(model)
        run.seconds = time.perf_counter() - start
        run.nodes_after = _count(model)
        log.debug("%s: %d rewrites in %.3f s", run.step, run.rewrites, run.seconds)
        if state is not None:
            state = _checked_count(run, state, fingerprint(model))
        for watch in instruments:
            watch.after(run, model)
    except Exception as error:  # whatever it is, instruments are told and it goes on up
        for watch in instruments:
            watch.failed(run, model, error)
        error.add_note(f"in pass {run.index} of {run.count}, {run.step}")
        raise
    return state


def _checked_count(run: PassRun, before: Fingerprint, after: Fingerprint) -> Fingerprint:
    """Instruments look where a pass says that it changed something: it must not say otherwise."""
    difference = "" if run.rewrites else before.difference(after)
    if difference:
        raise CheckError(
            f"{run.name} changed the model and returned 0",
            f"the first thing that differs: {difference}",
            "Return the number of rewrites from its run(): 0 says that the model is untouched",
        )
    return after


def _count(model: ir.Model) -> int:
    return sum(len(graph) for graph in ir.all_graphs(model))


# --- text to passes ---------------------------------------------------------------------------


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
        return pass_type(**given)

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
            given[name] = _convert(text, option.type)
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


# --- option types -----------------------------------------------------------------------------

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


def _convert(text: str, kind: Any) -> Any:
    """Read a value of a type that `_words` knows; ValueError or KeyError if the text is none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        # By text, as a choice may be a number.
        return {str(choice): choice for choice in arguments}[text]
    if origin is tuple:
        return tuple(_convert(part, arguments[0]) for part in text.split(",") if part)
    if arguments:
        return None if text == "none" else _convert(text, arguments[0])
    if kind is bool:
        if text not in _BOOLS:
            raise ValueError(text)
        return _BOOLS[text]
    return kind(text)


def _text(value: Any) -> str:
    """The text that `_convert` reads back as `value`."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(_text(element) for element in typing.cast("tuple[Any, ...]", value))
    text = str(value)
    return f'"{text}"' if not text or set(text) & set(' {}"\n\t') else text
