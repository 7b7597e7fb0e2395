"""Blocked round-to-nearest as compiled loops: the bytes of `blockwise.quantize`, but sooner.

numpy reads and writes memory for every step; here a group stays in the registers and the nearest
cache from its first reading to its last. Needs numba, which nothing else does (the extra `fast`).
Every operation is one that IEEE 754 rounds in one way, in the order of `blockwise`, and nothing
lets the compiler reorder them: so the results are equal, and not merely close.

Letters: K inputs of a linear layer, N its outputs, g the group size, G = ceil(K/g) groups.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from omforge.passes.quantization.blockwise import Scheme, infinite, tried

Array = npt.NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

numba: Any = importlib.import_module("numba")


def _compiled(function: F) -> F:
    """Compiled on its first call; later processes read the machine code from a cache."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder for the cache can be written
        return cast(F, numba.njit(**options)(function))


# An integer type, and how its bits become those of a float32: shifted to the left, all but these
# kept, and the number multiplied (see `blockwise.widened`).
_FORMS: dict[np.dtype[Any], tuple[type[np.signedinteger[Any]], int, int, float]] = {
    np.dtype(np.float32): (np.int32, 0, -1, 1.0),
    np.dtype(ml_dtypes.bfloat16): (np.int16, 16, -1, 1.0),
    np.dtype(np.float16): (np.int16, 13, -0x70002000, 2.0**112),
}

_TILE = 1 << 15
"""Weights of neighbouring columns looked at together: a part of a core's cache."""


def supports(dtype: npt.DTypeLike) -> bool:
    """Whether there are loops for weights of this type."""
    return np.dtype(dtype) in _FORMS


def quantize_rows(weights: Array, scheme: Scheme, codes: Array) -> tuple[Array, Array]:
    """Round a matrix whose groups lie along its rows, the last of a row perhaps shorter.

    Args:
        weights: [N, K], of a type that `supports`.
        scheme: How to store.
        codes: int8 [N, K], C order, to be written.

    Returns:
        Scales, float32 [N, G], and zero points, int8 [N, G].

    Raises:
        InputError: As `blockwise.quantize`.
    """
    shape = (weights.shape[0], scheme.groups(weights.shape[1]))
    scale, zero = np.empty(shape, np.float32), np.empty(shape, np.int8)
    bits, form = _as_integers(weights)
    size = scheme.size(weights.shape[1])
    if _rows(bits, *form, size, *_arguments(scheme), codes, scale, zero):
        raise infinite()
    return scale, zero


def quantize_columns(weights: Array, scheme: Scheme, codes: Array) -> tuple[Array, Array]:
    """Round a matrix each of whose columns is one group.

    Args:
        weights: [g, N], of a type that `supports`.
        scheme: How to store.
        codes: int8 [g, N], C order, to be written.

    Returns:
        Scales, float32 [1, N], and zero points, int8 [1, N].

    Raises:
        InputError: As `blockwise.quantize`.
    """
    shape = (1, weights.shape[1])
    scale, zero = np.empty(shape, np.float32), np.empty(shape, np.int8)
    bits, form = _as_integers(weights)
    tile = min(max(16, _TILE // len(weights)), weights.shape[1])
    if _columns(bits, *form, tile, *_arguments(scheme), codes, scale[0], zero[0]):
        raise infinite()
    return scale, zero


def pack(codes: Array, packed: Array) -> None:
    """4-bit integers as ONNX stores them.

    Args:
        codes: int8, C order, an even number.
        packed: uint8, half as many, to be written.
    """
    _pack(codes.reshape(-1).view("<u2"), packed)


def _as_integers(weights: Array) -> tuple[Array, tuple[np.int32, np.int32, np.float32]]:
    integers, shift, kept, factor = _FORMS[weights.dtype]
    bits = np.ascontiguousarray(weights).view(integers)
    bits.flags.writeable = False  # as mapped ones are: each kind would be compiled for itself
    return bits, (np.int32(shift), np.int32(kept), np.float32(factor))


def _arguments(scheme: Scheme) -> tuple[np.float32, np.float32, bool, Array]:
    ratios: Sequence[float] = tried(scheme)
    low, high = np.float32(scheme.low), np.float32(scheme.high)
    return low, high, scheme.symmetric, np.array(ratios, np.float32)


@_compiled
def _ordered(bits: Any) -> Any:
    """A float32's bits as an integer that is larger where the float is; and back again.

    The compiler may reorder a maximum of integers, and so use all lanes; not one of floats.
    """
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@_compiled
def _beyond(least: Any, greatest: Any) -> bool:
    """Whether a range, as `_ordered` integers, has what no float16 is; a NaN's is beyond all."""
    limit = np.int32(0x47800000)  # 65536
    return greatest >= limit or least <= ~limit


@_compiled
def _nearest(exact: Any, low: Any, high: Any) -> Any:
    """The nearest integer within the limits, as a float."""
    return np.rint(min(max(exact, low), high))


@_compiled
def _square(exact: Any, low: Any, high: Any) -> Any:
    """The squared error of rounding, in steps of the scale."""
    error = _nearest(exact, low, high) - exact
    return error * error


@_compiled
def _loss(weights: Any, inverse: Any, offset: Any, low: Any, high: Any, terms: Any) -> Any:
    """The sum of a group's squared errors, folded half on half as `blockwise` does.

    Two folds are one expression: what is not stored need not be read again.
    """
    count = len(weights)
    if count % 4 == 0:
        count //= 4
        first, second = weights[:count], weights[count : 2 * count]
        third, fourth = weights[2 * count : 3 * count], weights[3 * count :]
        for i in range(count):
            odd = _square(first[i] * inverse + offset, low, high)
            odd += _square(third[i] * inverse + offset, low, high)
            even = _square(second[i] * inverse + offset, low, high)
            even += _square(fourth[i] * inverse + offset, low, high)
            terms[i] = odd + even
    else:
        for i in range(count):
            terms[i] = _square(weights[i] * inverse + offset, low, high)
    while count > 16 and count % 4 == 0:
        count //= 4
        for i in range(count):
            terms[i] = (terms[i] + terms[2 * count + i]) + (terms[count + i] + terms[3 * count + i])
    if count == 8:
        even = (terms[0] + terms[4]) + (terms[2] + terms[6])
        return even + ((terms[1] + terms[5]) + (terms[3] + terms[7]))
    while count > 1:
        half = count // 2
        count -= half
        for i in range(half):
            terms[i] += terms[count + i]
    return terms[0]


@_compiled
def _grid(
    least: Any,
    greatest: Any,
    ratio: Any,
    low: Any,
    high: Any,
    symmetric: Any,
    scale: Any,
    zero: Any,
) -> None:
    """Scales and zero points of ranges cut to a share of themselves, as `blockwise` has them."""
    count = len(scale)
    none = np.float32(0)
    signed = symmetric and high < np.float32(8)
    for i in range(count):
        if signed:
            scale[i] = max(greatest[i], -least[i]) * (ratio / -low)
        elif symmetric:
            scale[i] = max(greatest[i] / high, least[i] / low) * ratio
        else:
            bottom = min(least[i], none) * ratio
            scale[i] = (max(greatest[i], none) * ratio - bottom) / (high - low)
    bits = scale.view(np.int32)
    for i in range(count):
        if scale[i] < np.float32(2.0**-14):  # where float16 has the same step everywhere
            scale[i] = (scale[i] + np.float32(0.5)) - np.float32(0.5)
        else:
            odd = (bits[i] >> np.int32(13)) & np.int32(1)
            bits[i] = (bits[i] + np.int32(0xFFF) + odd) & np.int32(-0x2000)
        if scale[i] == none:
            scale[i] = np.float32(1)
        if signed and greatest[i] > -least[i]:
            scale[i] = -scale[i]
    for i in range(count):
        zero[i] = none
        if not symmetric:
            nearest = low - (min(least[i], none) * ratio) / scale[i]
            zero[i] = _nearest(nearest, low, high)


@_compiled
def _rows(
    source: Any,
    shift: Any,
    kept: Any,
    factor: Any,
    size: Any,
    low: Any,
    high: Any,
    symmetric: Any,
    ratios: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
) -> bool:
    rows, inputs = source.shape
    groups = scales.shape[1]
    bits = np.empty(inputs, np.int32)
    numbers = bits.view(np.float32)
    terms = np.empty(size, np.float32)
    least, greatest = np.empty(groups, np.int32), np.empty(groups, np.int32)
    scale = np.empty((len(ratios), groups), np.float32)
    zero = np.empty((len(ratios), groups), np.float32)
    for row in range(rows):
        line = source[row]
        for i in range(inputs):
            bits[i] = (np.int32(line[i]) << shift) & kept
        for i in range(inputs):
            numbers[i] *= factor
        for group in range(groups):
            # Slices, and indices from 0: one that might be negative costs a test for each weight.
            part = bits[group * size : min(group * size + size, inputs)]
            smallest = largest = _ordered(part[0])
            for i in range(len(part)):
                smallest = min(smallest, _ordered(part[i]))
                largest = max(largest, _ordered(part[i]))
            if _beyond(smallest, largest):
                return True
            least[group], greatest[group] = _ordered(smallest), _ordered(largest)
        for c in range(len(ratios)):
            ends = least.view(np.float32), greatest.view(np.float32)
            _grid(ends[0], ends[1], ratios[c], low, high, symmetric, scale[c], zero[c])
        for group in range(groups):
            weights = numbers[group * size : min(group * size + size, inputs)]
            best = 0
            fewest = np.float32(0)
            if len(ratios) > 1:
                for c in range(len(ratios)):
                    step, offset = scale[c, group], zero[c, group]
                    error = _loss(weights, np.float32(1) / step, offset, low, high, terms)
                    error *= step * step
                    if c == 0 or error < fewest:
                        best, fewest = c, error
            inverse, offset = np.float32(1) / scale[best, group], zero[best, group]
            made = codes[row, group * size : min(group * size + size, inputs)]
            for i in range(len(weights)):
                made[i] = np.int32(_nearest(weights[i] * inverse + offset, low, high))
            scales[row, group] = scale[best, group]
            zeros[row, group] = np.int32(offset)
    return False


@_compiled
def _columns(
    source: Any,
    shift: Any,
    kept: Any,
    factor: Any,
    tile: Any,
    low: Any,
    high: Any,
    symmetric: Any,
    ratios: Any,
    codes: Any,
    scales: Any,
    zeros: Any,
) -> bool:
    size, outputs = source.shape
    bits = np.empty((size, tile), np.int32)
    numbers = bits.view(np.float32)
    terms = np.empty((size if len(ratios) > 1 else 1, tile), np.float32)
    least, greatest = np.empty(tile, np.int32), np.empty(tile, np.int32)
    scale, zero = np.empty(tile, np.float32), np.empty(tile, np.float32)
    best_scale, best_zero = np.empty(tile, np.float32), np.empty(tile, np.float32)
    inverse, fewest = np.empty(tile, np.float32), np.empty(tile, np.float32)
    for start in range(0, outputs, tile):
        width = min(tile, outputs - start)
        least[:] = 0x7FFFFFFF
        greatest[:] = -0x80000000
        for i in range(size):
            line, part, row = source[i, start : start + width], bits[i], numbers[i]
            for j in range(width):
                part[j] = (np.int32(line[j]) << shift) & kept
            for j in range(width):
                row[j] *= factor
            for j in range(width):
                least[j] = min(least[j], _ordered(part[j]))
                greatest[j] = max(greatest[j], _ordered(part[j]))
        for j in range(width):
            if _beyond(least[j], greatest[j]):
                return True
            least[j], greatest[j] = _ordered(least[j]), _ordered(greatest[j])
        for c in range(len(ratios)):
            ends = least[:width].view(np.float32), greatest[:width].view(np.float32)
            _grid(ends[0], ends[1], ratios[c], low, high, symmetric, scale[:width], zero[:width])
            if len(ratios) > 1:
                for j in range(width):
                    inverse[j] = np.float32(1) / scale[j]
                count = size
                if count % 4 == 0:  # two folds at once, as in `_loss`
                    count //= 4
                    for i in range(count):
                        first, second = numbers[i], numbers[count + i]
                        third, fourth = numbers[2 * count + i], numbers[3 * count + i]
                        sums = terms[i]
                        for j in range(width):
                            step, offset = inverse[j], zero[j]
                            odd = _square(first[j] * step + offset, low, high)
                            odd += _square(third[j] * step + offset, low, high)
                            even = _square(second[j] * step + offset, low, high)
                            even += _square(fourth[j] * step + offset, low, high)
                            sums[j] = odd + even
                else:
                    for i in range(size):
                        for j in range(width):
                            terms[i, j] = _square(numbers[i, j] * inverse[j] + zero[j], low, high)
                while count > 1:
                    half = count // 2
                    count -= half
                    for i in range(half):
                        for j in range(width):
                            terms[i, j] += terms[count + i, j]
            for j in range(width):
                error = terms[0, j] * (scale[j] * scale[j])
                if c == 0 or error < fewest[j]:
                    fewest[j], best_scale[j], best_zero[j] = error, scale[j], zero[j]
        for j in range(width):
            inverse[j] = np.float32(1) / best_scale[j]
            scales[start + j] = best_scale[j]
            zeros[start + j] = np.int32(best_zero[j])
        for i in range(size):
            row, made = numbers[i], codes[i, start : start + width]
            for j in range(width):
                made[j] = np.int32(_nearest(row[j] * inverse[j] + best_zero[j], low, high))
    return False


@_compiled
def _pack(pairs: Any, packed: Any) -> None:
    for i in range(len(packed)):
        packed[i] = (pairs[i] & np.uint16(15)) | ((pairs[i] >> np.uint16(4)) & np.uint16(240))
