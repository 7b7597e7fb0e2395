"""Embeddings in place of token ids: rows of a table, or rows that the caller made.

A speech or vision model's decoder is exported so: what it reads is partly no text. The table is
beside the export, if anywhere; whoever has it gives it to the bundle (`Bundle.with_embeddings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from omforge.ir.bfloat16 import is_float
from omforge.ir.errors import InputError

Array = npt.NDArray[Any]


class EmbeddingTable(Protocol):
    """[V, H]: an array, one that is mapped from a file, or anything that gives rows like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """V and H."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """Return the rows of an array of token ids."""
        ...


class RandomEmbeddings:
    """Rows drawn by their number: what a model is verified with that has no table.

    Args:
        rows: V.
        hidden_size: H.
        scale: Their deviation.
        seed: Of the rows.
    """

    def __init__(self, rows: int, hidden_size: int, scale: float, seed: int = 0) -> None:
        self.shape = (rows, hidden_size)
        self._scale = scale
        self._seed = seed

    def __getitem__(self, index: Any, /) -> Array:
        """Return rows, float32 [..., H], without keeping any."""
        ids = np.asarray(index)
        rows = [
            np.random.default_rng([self._seed, int(number)]).standard_normal(self.shape[1])
            for number in ids.ravel()
        ]
        found = self._scale * np.array(rows, np.float32)
        return found.astype(np.float32).reshape(*ids.shape, self.shape[1])


def embedded(
    prompt: Sequence[int] | Array, table: EmbeddingTable | None, hidden_size: int
) -> Array:
    """Return a prompt as float32 [tokens, H]: rows as they are, or those of token ids.

    Raises:
        InputError: It is ids and there is no table, or rows of another width, or an id is outside
            the table.
    """
    array = np.asarray(prompt)
    if not array.size:
        return np.zeros((0, hidden_size), np.float32)
    if is_float(array.dtype):
        if array.ndim != 2 or array.shape[1] != hidden_size:
            raise InputError(
                f"a prompt of embeddings is {list(array.shape)}",
                f"the model takes rows of {hidden_size} numbers",
            )
        return array.astype(np.float32)
    if table is None:
        raise InputError(
            "the model is fed by embeddings, and there is no table to look tokens up in",
            "its export has none",
            "Give rows of embeddings, or open the bundle with_embeddings(table)",
        )
    outside = [int(token) for token in array if not 0 <= token < table.shape[0]]
    if outside:
        raise InputError(
            f"token {outside[0]} is outside the table of embeddings",
            f"it has rows 0 to {table.shape[0] - 1}",
            "Use the tokenizer that belongs to the model",
        )
    return np.asarray(table[array], np.float32)
