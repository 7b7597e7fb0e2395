"""Passes of the caller's own among those that raise: `--insert-pass after=fuse-swish:my-pass`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, TypeAlias

from omforge.ir.errors import InputError
from omforge.passes import ALL_PASSES, PIPELINES, make_pipeline
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
    anchor, colon, pipeline = (part.strip() for part in rest.partition(":"))
    sides: dict[str, Where] = {"before": "before", "after": "after"}
    where = sides.get(side.strip()) if equals and colon and pipeline else None
    if where is None:
        raise InputError(
            f"--insert-pass {text}",
            "it says no side, pass and pipeline",
            f"Write for example {_EXAMPLE}",
        )
    insertion = Insertion(where, anchor, make_pipeline(pipeline).passes)
    inserted((insertion,), make_pipeline(_STAGE).passes)  # refuses an anchor that is none
    return insertion


def inserted(
    insertions: Sequence[Insertion], *parts: Sequence[Pass]
) -> tuple[tuple[Pass, ...], ...]:
    """Return the parts of a pipeline with the caller's passes among theirs.

    Several at one place stand in the order in which they were given.

    Raises:
        InputError: A pass ahead of or behind which others are to run is in no part.
    """
    where = [(part, index) for part, steps in enumerate(parts) for index in range(len(steps))]
    ahead: dict[tuple[int, int], list[Pass]] = {}
    behind: dict[tuple[int, int], list[Pass]] = {}
    for each in insertions:
        places = [at for at in where if parts[at[0]][at[1]].name == each.anchor]
        if not places:
            passes = ",".join(str(step) for step in each.passes)
            raise InputError(
                f"--insert-pass {each.where}={each.anchor}:{passes}",
                *_not_among(each.anchor, [step for steps in parts for step in steps]),
            )
        if each.where == "before":
            ahead.setdefault(places[0], []).extend(each.passes)
        else:
            behind.setdefault(places[-1], []).extend(each.passes)
    made: list[list[Pass]] = [[] for _ in parts]
    for at in where:
        made[at[0]] += (*ahead.get(at, ()), parts[at[0]][at[1]], *behind.get(at, ()))
    return tuple(map(tuple, made))


def pass_that_runs(text: str, steps: Sequence[Pass]) -> str:
    """Return the name of the pass that `explain --pass` means, among those that run.

    Raises:
        InputError: There is no such pass, or it does not run.
    """
    known = ALL_PASSES.get(text)
    name = text if known is None else known.name
    if any(step.name == name for step in steps):
        return name
    if known is None:
        why, next_step = _not_among(text, steps)
        raise InputError(f"--pass {text}: there is no pass {text!r}", why, next_step)
    raise InputError(
        f"--pass {text}",
        "it is none of the passes that raise",
        f"Say where it shall run among them: --insert-pass after=fuse-swish:{text}",
    )


def _not_among(name: str, steps: Sequence[Pass]) -> tuple[str, str]:
    """Why a pass cannot be meant, and what next."""
    names = list(dict.fromkeys(step.name for step in steps))
    near = get_close_matches(name, names, n=1)
    why = f"{name!r} is none of the passes that raise; they are {', '.join(names)}"
    return why, f"Did you mean {near[0]}?" if near else "Name one of these"
