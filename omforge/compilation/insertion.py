"""Passes of the caller's own among those that raise: `--insert-pass after=fuse-swish:my-pass`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, TypeAlias

from omforge.ir.errors import InputError
from omforge.passes import PIPELINES, make_pipeline
from omforge.rewriting.base import Pass

Where: TypeAlias = Literal["before", "after"]

_EXAMPLE = "after=fuse-swish:my-pass, before=fuse-attention:my_package.my_module:MyPass{k=2}"
_STAGE = PIPELINES["raise"]


@dataclass(frozen=True)
class Insertion:
    """Passes ahead of another one, or behind it.

    Attributes:
        where: On which side.
        anchor: Name of a pass of the pipeline `raise`; where it runs several times, `before` is
            ahead of the first and `after` behind the last.
        passes: What is put there.
    """

    where: Where
    anchor: str
    passes: tuple[Pass, ...]


def parse_insertion(text: str) -> Insertion:
    """Read `after=PASS:PIPELINE` or `before=PASS:PIPELINE`.

    Raises:
        InputError: It is neither, the pass is not among those that raise, or the pipeline is wrong.
    """
    side, equals, rest = text.partition("=")
    anchor, colon, pipeline = rest.partition(":")
    sides: dict[str, Where] = {"before": "before", "after": "after"}
    where = sides.get(side.strip()) if equals and colon and pipeline.strip() else None
    if where is None:
        raise InputError(
            f"--insert-pass {text}",
            "it says no side, pass and pipeline",
            f"Write for example {_EXAMPLE}",
        )
    names = list(dict.fromkeys(step.name for step in make_pipeline(_STAGE).passes))
    if (anchor := anchor.strip()) not in names:
        near = get_close_matches(anchor, names, n=1)
        raise InputError(
            f"--insert-pass {text}: {anchor!r} is none of the passes that raise",
            f"they are {', '.join(names)}",
            f"Did you mean {near[0]}?" if near else "Name one of these",
        )
    return Insertion(where, anchor, make_pipeline(pipeline).passes)


def inserted(
    insertions: Sequence[Insertion], *parts: Sequence[Pass]
) -> tuple[tuple[Pass, ...], ...]:
    """Return the parts of a pipeline with the caller's passes among theirs.

    Several at one place stand in the order in which they were given.
    """
    where = [(part, index) for part, steps in enumerate(parts) for index in range(len(steps))]
    ahead: dict[tuple[int, int], list[Pass]] = {}
    behind: dict[tuple[int, int], list[Pass]] = {}
    for each in insertions:
        places = [at for at in where if parts[at[0]][at[1]].name == each.anchor]
        if each.where == "before":
            ahead.setdefault(places[0], []).extend(each.passes)
        else:
            behind.setdefault(places[-1], []).extend(each.passes)
    made: list[list[Pass]] = [[] for _ in parts]
    for at in where:
        made[at[0]] += (*ahead.get(at, ()), parts[at[0]][at[1]], *behind.get(at, ()))
    return tuple(map(tuple, made))
