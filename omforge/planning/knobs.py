"""What else could be chosen, and the bytes that each choice saves: counted on graphs lowered so."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omforge import ir
from omforge.compilation.options import CompileOptions
from omforge.planning.chosen import UNIT
from omforge.planning.memory import MemoryMap, memory_map
from omforge.planning.subject import ExportSubject, Subject

_LEAST_CONTEXT = 128

_TRIES = 6
"""Sets of choices that are counted, of those that should fit."""

_LOSING = ("context", "batch")
"""Options that take something from what is served, and not from how."""


@dataclass(frozen=True)
class Knob:
    """A choice, and what it makes of the memory.

    Attributes:
        flags: As it is written on the command line.
        options: All options with it.
        total: Bytes that the device then holds; None where the choice cannot be made.
        saved: Bytes fewer than before; below 0 where it takes more.
        why: Why it cannot be made.
    """

    flags: str
    options: CompileOptions
    total: int | None
    saved: int = 0
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"flags": self.flags, "total": self.total, "saved": self.saved, "why": self.why}


def weigh(subject: Subject, options: CompileOptions, now: MemoryMap) -> tuple[Knob, ...]:
    """Try each choice by itself.

    Args:
        subject: What is compiled.
        options: As they are.
        now: What they make of the memory.
    """
    return tuple(_try(subject, now, *choice) for choice in _choices(subject, options))


def fitting(
    subject: Subject, options: CompileOptions, now: MemoryMap, knobs: tuple[Knob, ...], limit: int
) -> Knob | None:
    """Return several choices that make it fit together, few and mild ones first; None if none do.

    What they save together is reckoned from what each saves, and counted before it is told.
    """
    usable = [knob for knob in knobs if knob.total is not None and knob.saved > 0]
    found = [
        (lost, len(chosen), reckoned, chosen)
        for size in range(2, len(usable) + 1)
        for chosen in itertools.combinations(usable, size)
        if len({_changed(knob, options) for knob in chosen}) == size
        and (reckoned := now.total - sum(knob.saved for knob in chosen)) <= limit
        for lost in (sum(_changed(knob, options) in _LOSING for knob in chosen),)
    ]
    for _, _, _, chosen in sorted(found, key=lambda each: each[:3])[:_TRIES]:
        both = options
        for knob in chosen:
            name = _changed(knob, options)
            both = dataclasses.replace(both, **{name: getattr(knob.options, name)})
        both = dataclasses.replace(both, prefill=_within(both.prefill, both.context or 0))
        tried = _try(subject, now, " ".join(knob.flags for knob in chosen), both)
        if tried.total is not None and tried.total <= limit:
            return tried
    return None


def _changed(knob: Knob, options: CompileOptions) -> str:
    """The option that a choice is about."""
    names = ("context", "quantize", "kv_dtype", "front", "batch", "gears", "prefill")
    return next(name for name in names if getattr(knob.options, name) != getattr(options, name))


def _choices(subject: Subject, options: CompileOptions) -> Iterator[tuple[str, CompileOptions]]:
    encode = subject.task == "encode"
    if isinstance(subject, ExportSubject):
        kinds = ("int8", "int4") if not options.quantize else ("int4",)
        for kind in kinds:
            if not options.quantize.startswith(("w8a8", kind)):
                yield f"--quantize {kind}", dataclasses.replace(options, quantize=kind)
        if options.kv_dtype == "fp16" and not encode:
            yield "--kv-dtype int8", dataclasses.replace(options, kv_dtype="int8")
        other = "air" if options.front == "onnx" else "onnx"
        yield f"--front {other}", dataclasses.replace(options, front=other)
    lengths, context = options.prefill, options.context or 0
    longest = max(lengths)
    if longest > UNIT:
        shorter = lengths[:-1] or (max(UNIT, longest // 2),)
        named = ",".join(map(str, shorter))
        if shorter != lengths:
            yield f"--prefill {named}", dataclasses.replace(options, prefill=shorter)
    if options.batch > 1:
        yield "--batch 1", dataclasses.replace(options, batch=1)
    half = context // 2 // UNIT * UNIT
    if half >= _LEAST_CONTEXT and not encode:
        fewer = dataclasses.replace(options, context=half, prefill=_within(lengths, half))
        yield f"--context {half}", fewer
    if not options.gears and (not encode or len(lengths) > 1):
        yield "--gears", dataclasses.replace(options, gears=True)


def _within(lengths: tuple[int, ...], context: int) -> tuple[int, ...]:
    return tuple(length for length in lengths if length <= context) or (context,)


def _try(subject: Subject, now: MemoryMap, flags: str, options: CompileOptions) -> Knob:
    try:
        total = memory_map(subject.lower(options), subject.fixed).total
    except ir.OmforgeError as error:
        return Knob(flags, options, None, why=error.why or error.what)
    return Knob(flags, options, total, now.total - total)
