"""How long a text and a prefill may be: what was asked for, within what model and graph allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from omforge import ir
from omforge.recognition.lengths.bounds import Bound

Array = npt.NDArray[Any]

DEFAULT_CONTEXT = 2048
DEFAULT_PREFILL = 128


def choose_context(asked: int | None, bounds: Sequence[Bound]) -> int:
    """The tokens C that a sequence may hold; 2,048, or less if a bound is tighter, unless asked.

    Raises:
        InputError: More is asked for than a bound allows.
    """
    tightest = min(bounds, key=lambda bound: bound.tokens, default=None)
    if tightest is None:
        return asked or DEFAULT_CONTEXT
    if asked is not None and asked > tightest.tokens:
        raise ir.InputError(
            f"a context of {asked} tokens is too long",
            tightest.why,
            f"Choose --context {tightest.tokens} or less",
        )
    return asked or min(tightest.tokens, DEFAULT_CONTEXT)


def choose_prefill(
    asked: Sequence[int], context: int, call: Bound | None = None
) -> tuple[int, ...]:
    """The lengths S of the prefill buckets, in order; one of 128 unless asked, or of a tighter one.

    Args:
        asked: What the caller wants.
        context: Tokens of the longest text.
        call: The most new tokens that the export takes at once, if there is such a limit.

    Raises:
        InputError: A length makes no sense, or the export is wrong for it.
    """
    longest = context if call is None else min(context, call.tokens)
    chosen = tuple(sorted(set(asked))) or (min(DEFAULT_PREFILL, longest),)
    wrong = [length for length in chosen if not 1 < length <= context]
    if wrong:
        raise ir.InputError(
            f"a prefill bucket of {wrong[0]} tokens makes no sense",
            f"it must be above 1 and fit in the context of {context}",
            "Choose other --prefill lengths",
        )
    if call is not None and chosen[-1] > call.tokens:
        raise ir.InputError(
            f"a prefill bucket of {chosen[-1]} tokens is more than the export can run",
            call.why,
            f"Choose --prefill {call.tokens} or less, or export it with more new tokens in its "
            "sample",
        )
    return chosen


def cut_pieces(pieces: Sequence[Array], longest: int | None) -> tuple[Array, ...]:
    """Cut pieces of a calibration text [S] into ones of at most so many tokens, and at least two.

    A model of few positions ends at a piece that is longer, in a Gather.
    """
    if longest is None:
        return tuple(pieces)
    cut = (piece[at : at + longest] for piece in pieces for at in range(0, len(piece), longest))
    return tuple(part for part in cut if len(part) > 1)
