"""Calibration texts as token numbers: in a file, or from the start of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.ir.errors import InputError

Array = npt.NDArray[Any]

_NEXT = "Write them with numpy.save, or give a text"

_FIRST, _MOST = 1 << 16, 1 << 20
"""Characters read at first, and of a text that has few tokens."""
_SURE = 64
"""Tokens at a cut, which more text could change."""


def read_tokens(path: str) -> Sequence[Array]:
    """Return the pieces [S] of a .npy file of token numbers [pieces, S]; none for no file.

    Raises:
        InputError: It cannot be read, or holds something else.
    """
    if not path:
        return ()
    try:
        array: Array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read token numbers from {path}", str(error), _NEXT) from error
    if array.ndim != 2 or array.dtype.kind not in "iu" or array.shape[1] < 2:
        raise InputError(
            f"{path} holds {array.dtype}{list(array.shape)}",
            "token numbers are integers of shape [pieces, tokens of a piece], two or more a piece",
            _NEXT,
        )
    return list(array)


def leading_tokens(file: Path, encode: Callable[[str], Sequence[int]], count: int) -> list[int]:
    """Return the first `count` tokens of a text, or all there are.

    A tokenizer takes hundreds of bytes for each character, so no more is read than is needed.

    Args:
        file: The text, in UTF-8.
        encode: The tokenizer.
        count: How many tokens at most.

    Raises:
        OSError: The file cannot be read.
        UnicodeDecodeError: It is not in UTF-8.
    """
    with file.open(encoding="utf-8") as stream:
        text = stream.read(_FIRST)
        while True:
            tokens = encode(text)
            if len(tokens) >= count + _SURE:
                return list(tokens[:count])
            more = stream.read(len(text)) if len(text) < max(_MOST, 64 * count) else ""
            if not more:
                return list(tokens[:count])
            text += more
