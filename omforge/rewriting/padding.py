"""What a step computes for tokens that are padding: numbers that nobody reads, and may be any.

No key is visible to them, so that a softmax over their scores is of infinities, or of the lowest
numbers there are: each spelling of attention makes something else of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class StepFeeds(dict[str, Array]):
    """The inputs of one step, which know which of its tokens are padding.

    Args:
        arrays: The inputs by name.
        first: The index of each row's first real token, counted from the past's begin [B].
        past: Tokens in the past.
        seq: New tokens S.
    """

    def __init__(self, arrays: dict[str, Array], first: Array, past: int, seq: int) -> None:
        super().__init__(arrays)
        self._first, self._past, self._seq = first, past, seq

    @property
    def tokens(self) -> Array:
        """What it knows besides the inputs: past, new tokens and first, in one array."""
        return np.array([self._past, self._seq, *self._first])

    def read(self, output: Array) -> npt.NDArray[np.bool_] | None:
        """Return where an output is of a real token, as a mask that it broadcasts; None for all.

        Tokens are found by their number: on axis 1 behind the rows (logits [B, S, V]), on the last
        but one (caches [B, K, P+S, D], and [2*L*B, K, S, D]), or ahead of the rows [P+S, B, K, D].
        """
        rows, index = len(self._first), np.arange(self._past, self._past + self._seq)
        real = index >= self._first[:, None]  # [B, S]
        if real.all():
            return None
        whole = np.concatenate([np.ones((rows, self._past), np.bool_), real], axis=1)
        by_length = {self._seq: real, whole.shape[1]: whole}
        shape = output.shape
        if len(shape) >= 4 and shape[0] % rows == 0 and shape[-2] in by_length:
            mask = np.tile(by_length[shape[-2]], (shape[0] // rows, 1))
            return mask.reshape(shape[0], *[1] * (len(shape) - 3), shape[-2], 1)
        if len(shape) >= 2 and shape[0] == rows and shape[1] in by_length:
            return by_length[shape[1]].reshape(*shape[:2], *[1] * (len(shape) - 2))
        if len(shape) >= 2 and shape[1] == rows and shape[0] in by_length:
            return by_length[shape[0]].T.reshape(*shape[:2], *[1] * (len(shape) - 2))
        return None
