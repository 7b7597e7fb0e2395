"""The prompts that a bundle is verified on: one for each way through its graphs.

Letters: B batch, S tokens of a prefill bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omforge.runtime.bundle import Bundle

_WHOLE = 1 << 34
"""Bytes of weights, read once a token, up to which the whole context is filled token by token."""

_FIRST = 16
"""Tokens of the prompt whose cache is repeated where the context is not filled token by token."""

_PLACES = 4
"""Places between that prompt and the end of the context that a token goes to."""

_LAST_STEPS = 2
"""Decode steps at the end of such a context."""


@dataclass(frozen=True)
class Part:
    """Tokens that go on at a later place, of every row; until there the cache is repeated."""

    start: int
    tokens: tuple[tuple[int, ...], ...]

    @property
    def end(self) -> int:
        """How many tokens a row has behind it."""
        return self.start + len(self.tokens[0])


@dataclass(frozen=True)
class Case:
    """One run: a batch of prompts, what goes on at later places, then decode steps.

    Attributes:
        name: What is special about it.
        prompts: Tokens by row.
        parts: In the order of their places.
        steps: Decode steps at the end; None for as many as all cases have.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...] = ()
    steps: int | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each row has ahead of the decode steps."""
        if self.parts:
            return tuple(self.parts[-1].end for _ in self.prompts)
        return tuple(map(len, self.prompts))

    def position(self, step: int) -> int:
        """Where the last token of the longest row is in a step; 0 is the prompt, then the parts."""
        ends = [max(map(len, self.prompts)), *(part.end for part in self.parts)]
        last = len(ends) - 1
        return ends[min(step, last)] + max(0, step - last) - 1


def make_cases(
    bundle: Bundle,
    steps: int = 8,
    seed: int = 0,
    prompts: Sequence[Sequence[int]] | None = None,
) -> list[Case]:
    """Return the cases of a bundle: each kind of prompt that takes another way through its graphs.

    One token; shorter than a prefill bucket; longer than the largest (in chunks); longer than each
    sliding window; where a batch has rows, rows of different lengths, padded on the left (but for
    models with recurrent states, which are never padded); and where there are several buckets, one
    that each of the larger ones ends, so that all read a past, if the context has room for it; and
    one that fills the context to its last position. Of a large model in a long context that one
    goes on at places in between, with the cache of a short prompt repeated in front of each, which
    costs as many tokens as are computed and not as many as there are positions.

    The random tokens are none that pads: no text has it, and its embedding may be zero, which a
    norm makes noise of.

    Args:
        bundle: The bundle.
        steps: Room to leave behind each prompt, if the context allows.
        seed: Of the random tokens.
        prompts: Use these instead.
    """
    manifest = bundle.manifest
    if prompts is not None:
        rows = [tuple(prompt) for prompt in prompts]
        if manifest.states and len(set(map(len, rows))) > 1:
            # Rows of a batch have one length, or padding would go into the states of the shorter.
            return [
                Case(f"batch {batch}, prompt {number}", _filled([row], batch))
                for batch in bundle.batches
                for number, row in enumerate(rows)
            ]
        return [
            Case(f"batch {batch}, prompts {start} to {start + batch - 1}", chunk)
            for batch in bundle.batches
            for start in range(0, len(rows), batch)
            # A last, smaller chunk is filled with its first prompt: exports have no idle rows.
            for chunk in [_filled(rows[start : start + batch], batch)]
        ]
    lengths = {seq for b in manifest.buckets for seq in (b.gears or (b.seq,))}
    sizes = sorted(lengths - {1}) or [8]
    windows = sorted({mask.window for mask in manifest.masks if mask.window is not None})
    kinds = {
        "one token": 1,
        "shorter than a bucket": max(2, sizes[0] * 3 // 4),
        "in chunks": sizes[-1] + sizes[0] // 2 + 1,
        **{f"beyond the window of {window}": window + 3 for window in windows},
    }
    longest = max(1, room(bundle) - steps)
    kinds = {name: min(length, longest) for name, length in kinds.items()}
    ends = {f"ends in the bucket of {size}": sizes[-1] + size for size in sizes[1:]}
    ends = {name: length for name, length in ends.items() if length <= longest}
    stream = np.random.default_rng(seed)
    vocabulary, padding = manifest.model.vocab_size, manifest.model.pad_token_id

    def prompt(length: int) -> tuple[int, ...]:
        tokens = stream.integers(0, vocabulary, length)
        if padding is not None:
            tokens[tokens == padding] = (padding + 1) % vocabulary
        return tuple(tokens.tolist())

    def filling(name: str, batch: int) -> Case:
        weights = (bundle.folder / manifest.weights).stat().st_size
        if longest < 2 * _FIRST or longest * batch * weights <= _WHOLE:
            return Case(name, tuple(prompt(longest) for _ in range(batch)))
        steps_left = max(0, room(bundle) - longest)
        end = room(bundle) - min(_LAST_STEPS, steps_left)
        last = min(sizes[-1], end - _FIRST - 1)
        span = end - last - _FIRST
        edges = sorted({_FIRST + span * place // _PLACES for place in range(_PLACES + 1)})
        starts: list[int] = stream.integers(edges[:-1], edges[1:]).tolist()
        prompts = tuple(prompt(_FIRST) for _ in range(batch))
        parts = [
            Part(start, tuple(prompt(count) for _ in range(batch)))
            for start, count in [*((start, 1) for start in starts), (end - last, last)]
        ]
        return Case(name, prompts, tuple(parts), min(_LAST_STEPS, steps_left))

    cases: list[Case] = []
    for batch in bundle.batches:
        for name, length in (kinds | ends).items():
            label = name if batch == 1 else f"{name}, batch {batch}"
            cases.append(Case(label, tuple(prompt(length) for _ in range(batch))))
        if longest > max((*kinds.values(), *ends.values())):
            name = "to the end of the context"
            cases.append(filling(name if batch == 1 else f"{name}, batch {batch}", batch))
        if batch > 1 and not manifest.states:
            lengths = sorted(kinds.values(), reverse=True)
            mixed = tuple(prompt(lengths[row % len(lengths)]) for row in range(batch))
            cases.append(Case(f"padded on the left, batch {batch}", mixed))
    return cases


def _filled(rows: Sequence[tuple[int, ...]], batch: int) -> tuple[tuple[int, ...], ...]:
    return (*rows, *[rows[0]] * (batch - len(rows)))


def room(bundle: Bundle) -> int:
    """How many tokens a sequence may have."""
    limit = bundle.manifest.model.max_positions
    capacity = bundle.manifest.kv.capacity
    return capacity if limit is None else min(capacity, limit)
