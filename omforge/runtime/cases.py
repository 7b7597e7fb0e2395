"""The prompts that a bundle is verified on: one for each way through its graphs.

Letters: B batch, S tokens of a prefill bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omforge.runtime.bundle import Bundle


@dataclass(frozen=True)
class Case:
    """One run: a batch of prompts."""

    name: str
    prompts: tuple[tuple[int, ...], ...]


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
    that each of the larger ones ends, so that all read a past, if the context has room for it.

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

    cases: list[Case] = []
    for batch in bundle.batches:
        for name, length in (kinds | ends).items():
            label = name if batch == 1 else f"{name}, batch {batch}"
            cases.append(Case(label, tuple(prompt(length) for _ in range(batch))))
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
