"""NaN and infinity among the bytes of a tensor, found while they are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Nonfinite = Literal["", "infinity", "NaN"]

_BLOCK = 1 << 15
"""Elements looked at together: they and their copy stay in the first cache."""

# A float's exponent is all ones where it is infinite, and with it a bit of its fraction for NaN.
_EXPONENT: Mapping[ir.DataType, tuple[Any, int]] = {
    ir.DataType.FLOAT16: (np.uint16, 0x7C00),
    ir.DataType.BFLOAT16: (np.uint16, 0x7F80),
    ir.DataType.FLOAT: (np.uint32, 0x7F800000),
    ir.DataType.DOUBLE: (np.uint64, 0x7FF0000000000000),
}


def nonfinite(dtype: ir.DataType, content: bytes | memoryview) -> Nonfinite:
    """Return the worst that whole elements hold; "" for dtypes that have no such numbers."""
    if dtype not in _EXPONENT:
        return ""
    kind, exponent = _EXPONENT[dtype]
    bits = cast("npt.NDArray[Any]", np.frombuffer(content, kind, len(content) // kind().itemsize))
    rest, magnitude = np.empty(min(_BLOCK, bits.size), kind), kind(np.iinfo(kind).max >> 1)
    worst = 0
    for at in range(0, bits.size, _BLOCK):
        block = bits[at : at + _BLOCK]
        np.bitwise_and(block, magnitude, out=rest[: len(block)])
        worst = max(worst, int(rest[: len(block)].max()))
    return "NaN" if worst > exponent else "infinity" if worst == exponent else ""


def worse(first: Nonfinite, second: Nonfinite) -> Nonfinite:
    """Return the worse of two: one NaN spoils every sum that it is in."""
    return "NaN" if "NaN" in (first, second) else first or second
