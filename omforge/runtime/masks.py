"""The attention masks and positions of one step, which the runtime makes and the graph only adds.

A row (batch entry) is described by one number: `first`, the slot of its first real token. Rows that
are padded on the left have first > 0; slots first .. past are valid.

Letters: B batch, S new tokens (of which `count` are real; the rest pad the bucket on the right),
C cache capacity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir

Array = npt.NDArray[Any]
Firsts = npt.NDArray[np.int64]


def additive_mask(
    window: int | None,
    first: Firsts,
    *,
    past: int,
    seq: int,
    count: int,
    capacity: int,
    dtype: str,
    mask_value: float,
    in_place: bool = False,
) -> Array:
    """Return [B, 1, S, C+S] of `dtype`: 0 where query i sees a key, `mask_value` where it does not.

    Keys are the C cache slots, then the S new tokens. Query i has the absolute index past+i. It
    sees valid keys that are not later, and with a window W only those less than W tokens back.
    Every query sees itself, padding too: a row that is masked throughout would average garbage.

    Args:
        window: The sliding window W, or None for a plain causal mask.
        first: int64 [B], the index of each row's first real token.
        past: How many cache slots hold tokens.
        seq: S.
        count: How many of the S tokens are real.
        capacity: C.
        dtype: A float dtype's numpy name.
        mask_value: Finite and negative.
        in_place: The S new tokens are in the slots past .. past+S, and the result is [B, 1, S, C].
    """
    query = past + np.arange(seq)[:, None]
    slots = np.arange(capacity)
    new = np.arange(seq)
    if in_place:
        visible = (slots < past + count) & (slots <= query)
        if window is not None:
            visible &= query - slots < window
        rows = visible & (slots >= first[:, None, None])
        rows[:, new, past + new] = True
        return np.where(rows, 0.0, mask_value).astype(dtype)[:, None]
    # One axis for both kinds of key: where each stands in the text, and whether it is there at all.
    key = np.concatenate([slots, past + new])
    exists = np.concatenate([slots < past, new < count])
    visible = exists & (key <= query)
    if window is not None:
        visible &= query - key < window
    rows = visible & (key >= first[:, None, None])
    rows[:, new, capacity + new] = True
    return np.where(rows, 0.0, mask_value).astype(dtype)[:, None]


def full_mask(
    window: int | None, lengths: Firsts, *, seq: int, dtype: str, mask_value: float
) -> Array:
    """Return [B, 1, S, S] of `dtype`: 0 where query i sees key j, `mask_value` where it does not.

    Every query sees the row's own tokens, and itself: padding would average garbage.

    Args:
        window: None, or W: only keys less than W tokens away are seen, on both sides.
        lengths: int64 [B], the tokens of each row, from slot 0 on.
        seq: S.
        dtype: A float dtype's numpy name.
        mask_value: Finite and negative.
    """
    slots = np.arange(seq)
    distance = np.abs(slots[:, None] - slots)
    seen = slots < lengths[:, None, None]
    if window is not None:
        seen = seen & (distance < window)
    return np.where(seen | (distance == 0), 0.0, mask_value).astype(dtype)[:, None]


def positions(first: Firsts, *, past: int, seq: int, count: int) -> npt.NDArray[np.int64]:
    """Return int64 [B, S]: 0 on each row's first real token, counting up.

    Padding repeats the nearest real position: a number beyond the model's position table would be
    read out of bounds.
    """
    index = past + np.minimum(np.arange(seq), count - 1)
    return np.maximum(index - first[:, None], 0)


def key_positions(
    *, past: int, seq: int, count: int, capacity: int, dtype: str, in_place: bool = False
) -> Array:
    """Return [1, 1, 1, C+S] of `dtype`: where each key stands, for a bias by position (ALiBi).

    The last real token is 0 and those before it are -1, -2 and so on: attention does not see what
    is added to all keys of a query, and the numbers that matter most are the smallest, which
    float16 holds best. Keys that are not there get a number as near, and the mask hides them.
    """
    slots, new = np.arange(capacity), np.arange(seq)
    last = past + count - 1
    keys = np.concatenate([np.where(slots < past, slots, past), past + np.minimum(new, count - 1)])
    if in_place:  # [1, 1, 1, C]: the new tokens are in slots, too
        keys = np.minimum(slots, last)
    lowest = float(ir.DataType.from_numpy(np.dtype(dtype)).min)
    return np.maximum(keys - last, lowest).astype(dtype)[None, None, None]
