"""Calibration texts as token numbers in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.ir.errors import InputError

Array = npt.NDArray[Any]

_NEXT = "Write them with numpy.save, or give a text"


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
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise InputError(
            f"{path} holds {array.dtype}{list(array.shape)}",
            "token numbers are integers of shape [pieces, tokens of a piece]",
            _NEXT,
        )
    return list(array)
