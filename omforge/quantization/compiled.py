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

from omforge.quantization.blockwise import Scheme, infinite, tried

Array = npt.NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

numba: Any = importlib.import_module("numba")
_extending: Any = importlib.import_module("numba.extending")
_llvm: Any = importlib.import_module("llvmlite.ir")


def _compiled(function: F) -> F:
    """Compiled on its first call; later processes read the machine code from a cache."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no folder for the cache can be written
        return cast(F, numba.njit(**options)(function))


_SUPPORTED = {np.dtype(each) for each in (np.float32, np.float16, ml_dtypes.bfloat16)}

_TILE = 1 << 15
"""Weights of neighbouring columns looked at together: a part of a core's cache."""

_LANES = 16
"""Numbers of a vector in LLVM's sense, which makes several registers of it where it must."""


def supports(dtype: npt.DTypeLike) -> bool:
    """Whether there are loops for weights of this type."""
    return np.dtype(dtype) in _SUPPORTED


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
    bits, ends = _as_integers(weights, shape[1])
    size = scheme.size(weights.shape[1])
    if _rows(bits, ends, size, *_arguments(scheme), codes, scale, zero):
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
    tile = min(max(16, _TILE // len(weights)), weights.shape[1])
    bits, ends = _as_integers(weights, tile)
    if _columns(bits, ends, tile, *_arguments(scheme), codes, scale[0], zero[0]):
        raise infinite()
    return scale, zero


def pack(codes: Array, packed: Array) -> None:
    """4-bit integers as ONNX stores them.

    Args:
        codes: int8, C order, an even number.
        packed: uint8, half as many, to be written.
    """
    _pack(codes.reshape(-1).view("<u2"), packed)


def _as_integers(weights: Array, groups: int) -> tuple[Array, Array]:
    """The bits of the weights, and room for two of each group: its least and greatest."""
    if weights.dtype == ml_dtypes.bfloat16:
        weights = weights.astype(np.float32)
    integers = np.int16 if weights.dtype == np.float16 else np.int32
    bits = np.ascontiguousarray(weights).view(integers)
    bits.flags.writeable = False  # as mapped ones are: each kind would be compiled for itself
    return bits, np.empty((2, groups), integers)


def _arguments(scheme: Scheme) -> tuple[np.float32, np.float32, bool, Array]:
    ratios: Sequence[float] = tried(scheme)
    low, high = np.float32(scheme.low), np.float32(scheme.high)
    return low, high, scheme.symmetric, np.array(ratios, np.float32)


@_extending.intrinsic
def _float(_: Any, bits: Any) -> Any:
    """A weight's bits, of float16 or of float32, as a float32; in a register, not by memory.

    float16 as in `blockwise.widened`.
    """

    def code(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        integer, number = _llvm.IntType(32), _llvm.FloatType()
        if bits.bitwidth == 32:
            return builder.bitcast(arguments[0], number)
        wide = builder.shl(builder.sext(arguments[0], integer), integer(13))
        wide = builder.bitcast(builder.and_(wide, integer(-0x70002000)), number)
        return builder.fmul(wide, number(2.0**112))

    return numba.float32(bits), code


@_extending.intrinsic
def _bits(_: Any, number: Any) -> Any:
    """The bits of a float32, as an int32."""

    def code(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _llvm.IntType(32))

    return numba.int32(number), code


@_extending.intrinsic
def _ordered(_: Any, bits: Any) -> Any:
    """The bits of a float as an integer that is larger where the float is; and back again.

    The compiler may reorder a maximum of integers, and so use all lanes; not one of floats. The
    integers of float16 are short, and so are twice as many to a register.
    """

    def code(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        integer = _llvm.IntType(bits.bitwidth)
        negative = builder.ashr(arguments[0], integer(bits.bitwidth - 1))
        return builder.xor(arguments[0], builder.and_(negative, integer(bits.maxval)))

    return bits(bits), code


@_compiled
def _finite(least: Any, greatest: Any) -> bool:
    """Whether a range has only what a float16 is; a NaN is none."""
    limit = np.float32(65536)
    return least > -limit and greatest < limit


@_compiled
def _exact(weight: Any, inverse: Any, offset: Any, symmetric: Any) -> Any:
    """A weight in steps of the scale."""
    exact = weight * inverse
    return exact if symmetric else exact + offset


@_compiled
def _nearest(exact: Any, low: Any, high: Any) -> Any:
    """The nearest integer within the limits, as a float."""
    return np.rint(min(max(exact, low), high))


@_compiled
def _square(exact: Any, low: Any, high: Any) -> Any:
    """The squared error of rounding, in steps of the scale."""
    error = _nearest(exact, low, high) - exact
    return error * error


@_extending.intrinsic(prefer_literal=True)
def _vector_loss(
    _: Any, numbers: Any, first: Any, inverse: Any, offset: Any, low: Any, high: Any, size: Any
) -> Any:
    """`_loss` of `size` numbers from `first` on, a literal power of two from 16 on; in registers.

    A group is too short for a loop that the compiler makes, with what it tests before and after.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = _llvm.VectorType(_llvm.FloatType(), _LANES)
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        begin = builder.gep(array.data, [arguments[1]])
        factor, middle, least, most = (_spread(builder, each) for each in arguments[2:6])
        rounding = _llvm.FunctionType(vector, [vector])
        rint = builder.module.declare_intrinsic(f"llvm.rint.v{_LANES}f32", (), rounding)
        squares: list[Any] = []
        for index in range(0, size.literal_value, _LANES):
            place = builder.gep(begin, [_llvm.IntType(64)(index)])
            loaded = builder.load(builder.bitcast(place, vector.as_pointer()), align=4)
            exact = builder.fadd(builder.fmul(loaded, factor), middle)
            above = builder.select(builder.fcmp_ordered(">", exact, least), exact, least)
            within = builder.select(builder.fcmp_ordered("<", above, most), above, most)
            error = builder.fsub(builder.call(rint, [within]), exact)
            squares.append(builder.fmul(error, error))
        while len(squares) > 1:
            half = len(squares) // 2
            squares = [builder.fadd(squares[i], squares[half + i]) for i in range(half)]
        total, width = squares[0], _LANES
        while width > 1:
            width //= 2
            left = _picked(builder, total, range(width))
            total = builder.fadd(left, _picked(builder, total, range(width, 2 * width)))
        return builder.extract_element(total, _llvm.IntType(32)(0))

    return numba.float32(numbers, numba.int64, inverse, offset, low, high, size), code


def _spread(builder: Any, scalar: Any) -> Any:
    """A vector all of whose lanes are a float."""
    none = _llvm.Constant(_llvm.VectorType(_llvm.FloatType(), _LANES), _llvm.Undefined)
    one = builder.insert_element(none, scalar, _llvm.IntType(32)(0))
    return _picked(builder, one, [0] * _LANES)


def _picked(builder: Any, vector: Any, lanes: Sequence[int]) -> Any:
    """Some lanes of a vector."""
    indices = _llvm.VectorType(_llvm.IntType(32), len(lanes))
    none = _llvm.Constant(vector.type, _llvm.Undefined)
    return builder.shuffle_vector(vector, none, _llvm.Constant(indices, list(lanes)))


@_compiled
def _loss(
    weights: Any, inverse: Any, offset: Any, low: Any, high: Any, symmetric: Any, terms: Any
) -> Any:
    """The sum of a group's squared errors, folded half on half as `blockwise` does."""
    count = len(weights)
    for i in range(count):
        terms[i] = _square(_exact(weights[i], inverse, offset, symmetric), low, high)
    while count > 1:
        half = count // 2
        count -= half
        for i in range(half):
            terms[i] += terms[count + i]
    return terms[0]


@_compiled
def _storable(scale: Any) -> Any:
    """The nearest of float16's numbers; 1 where that is 0."""
    bits = _bits(scale)
    odd = (bits >> np.int32(13)) & np.int32(1)
    rounded = _float(np.int32((bits + np.int32(0xFFF) + odd) & np.int32(-0x2000)))
    if scale < np.float32(2.0**-14):  # where float16 has the same step everywhere
        rounded = (scale + np.float32(0.5)) - np.float32(0.5)
    return np.float32(1) if rounded == np.float32(0) else rounded


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
    if symmetric and high < np.float32(8):  # signed
        for i in range(count):
            found = _storable(max(greatest[i], -least[i]) * (ratio / -low))
            scale[i] = -found if greatest[i] > -least[i] else found
            zero[i] = none
    elif symmetric:
        for i in range(count):
            scale[i] = _storable(max(greatest[i] / high, least[i] / low) * ratio)
            zero[i] = none
    else:
        for i in range(count):
            bottom = min(least[i], none) * ratio
            found = _storable((max(greatest[i], none) * ratio - bottom) / (high - low))
            scale[i] = found
            zero[i] = _nearest(low - bottom / found, low, high)


@_compiled
def _rows(
    source: Any,
    ends: Any,
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
    numbers = np.empty(inputs, np.float32)
    terms = np.empty(size, np.float32)
    least, greatest = np.empty(groups, np.float32), np.empty(groups, np.float32)
    scale = np.empty((len(ratios), groups), np.float32)
    zero = np.empty((len(ratios), groups), np.float32)
    inverses = np.empty((len(ratios), groups), np.float32)
    for row in range(rows):
        line = source[row]
        for i in range(inputs):
            numbers[i] = _float(line[i])
        for group in range(groups):
            # Slices, and indices from 0: one that might be negative costs a test for each weight.
            part = line[group * size : min(group * size + size, inputs)]
            smallest = largest = _ordered(part[0])
            for i in range(len(part)):
                smallest = min(smallest, _ordered(part[i]))
                largest = max(largest, _ordered(part[i]))
            ends[0, group], ends[1, group] = smallest, largest
        for group in range(groups):
            least[group] = _float(_ordered(ends[0, group]))
            greatest[group] = _float(_ordered(ends[1, group]))
            if not _finite(least[group], greatest[group]):
                return True
        for c in range(len(ratios)):
            _grid(least, greatest, ratios[c], low, high, symmetric, scale[c], zero[c])
        for c in range(len(ratios)):
            for group in range(groups):
                inverses[c, group] = np.float32(1) / scale[c, group]
        for group in range(groups):
            first = group * size
            weights = numbers[first : min(first + size, inputs)]
            best = 0
            fewest = np.float32(0)
            if len(ratios) > 1:
                for c in range(len(ratios)):
                    inverse, offset = inverses[c, group], zero[c, group]
                    if len(weights) == 128:
                        error = _vector_loss(numbers, first, inverse, offset, low, high, 128)
                    elif len(weights) == 64:
                        error = _vector_loss(numbers, first, inverse, offset, low, high, 64)
                    elif len(weights) == 32:
                        error = _vector_loss(numbers, first, inverse, offset, low, high, 32)
                    else:
                        error = _loss(weights, inverse, offset, low, high, symmetric, terms)
                    error *= scale[c, group] * scale[c, group]
                    if c == 0 or error < fewest:
                        best, fewest = c, error
            inverse, offset = inverses[best, group], zero[best, group]
            made = codes[row, group * size : min(group * size + size, inputs)]
            for i in range(len(weights)):
                exact = _exact(weights[i], inverse, offset, symmetric)
                made[i] = np.int32(_nearest(exact, low, high))
            scales[row, group] = scale[best, group]
            zeros[row, group] = np.int32(offset)
    return False


@_compiled
def _columns(
    source: Any,
    ends: Any,
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
    numbers = np.empty((size, tile), np.float32)
    terms = np.empty((size if len(ratios) > 1 else 1, tile), np.float32)
    least, greatest = np.empty(tile, np.float32), np.empty(tile, np.float32)
    scale, zero = np.empty(tile, np.float32), np.empty(tile, np.float32)
    best_scale, best_zero = np.empty(tile, np.float32), np.empty(tile, np.float32)
    inverse, fewest = np.empty(tile, np.float32), np.empty(tile, np.float32)
    for start in range(0, outputs, tile):
        width = min(tile, outputs - start)
        end = start + width
        _ends(source, start, ends[0, :width], ends[1, :width])
        for j in range(width):
            least[j] = _float(_ordered(ends[0, j]))
            greatest[j] = _float(_ordered(ends[1, j]))
            if not _finite(least[j], greatest[j]):
                return True
        for i in range(size):
            line, row = source[i, start:end], numbers[i]
            for j in range(width):
                row[j] = _float(line[j])
        for c in range(len(ratios)):
            _grid(
                least[:width],
                greatest[:width],
                ratios[c],
                low,
                high,
                symmetric,
                scale[:width],
                zero[:width],
            )
            if len(ratios) > 1:
                for j in range(width):
                    inverse[j] = np.float32(1) / scale[j]
                _losses(numbers, inverse[:width], zero[:width], low, high, symmetric, terms)
            for j in range(width):
                error = terms[0, j] * (scale[j] * scale[j])
                if c == 0 or error < fewest[j]:
                    fewest[j], best_scale[j], best_zero[j] = error, scale[j], zero[j]
        for j in range(width):
            inverse[j] = np.float32(1) / best_scale[j]
            scales[start + j] = best_scale[j]
            zeros[start + j] = np.int32(best_zero[j])
        for i in range(size):
            row, made = numbers[i], codes[i, start:end]
            for j in range(width):
                exact = _exact(row[j], inverse[j], best_zero[j], symmetric)
                made[j] = np.int32(_nearest(exact, low, high))
    return False


@_compiled
def _ends(source: Any, start: Any, least: Any, greatest: Any) -> None:
    """The least and the greatest of each column, as `_ordered` integers; four rows at a time.

    Rows are cut out one by one: those of a view of columns have a stride that the compiler does
    not know.
    """
    size, width = len(source), len(least)
    end = start + width
    for j in range(width):
        least[j] = greatest[j] = _ordered(source[0, start + j])
    for i in range(0, size - size % 4, 4):
        first, second = source[i, start:end], source[i + 1, start:end]
        third, fourth = source[i + 2, start:end], source[i + 3, start:end]
        for j in range(width):
            a, b = _ordered(first[j]), _ordered(second[j])
            c, d = _ordered(third[j]), _ordered(fourth[j])
            least[j] = min(min(least[j], min(a, b)), min(c, d))
            greatest[j] = max(max(greatest[j], max(a, b)), max(c, d))
    for i in range(size - size % 4, size):
        line = source[i, start:end]
        for j in range(width):
            least[j] = min(least[j], _ordered(line[j]))
            greatest[j] = max(greatest[j], _ordered(line[j]))


@_compiled
def _losses(
    numbers: Any, inverse: Any, zero: Any, low: Any, high: Any, symmetric: Any, terms: Any
) -> None:
    """The sums of each column's squared errors, in the first row of `terms`; folded as `_loss`.

    Two folds are one expression: what is not stored need not be read again.
    """
    count, width = len(numbers), len(inverse)
    if count % 4 == 0:
        count //= 4
        for i in range(count):
            first, second = numbers[i], numbers[count + i]
            third, fourth = numbers[2 * count + i], numbers[3 * count + i]
            sums = terms[i]
            for j in range(width):
                step, offset = inverse[j], zero[j]
                odd = _square(_exact(first[j], step, offset, symmetric), low, high)
                odd += _square(_exact(third[j], step, offset, symmetric), low, high)
                even = _square(_exact(second[j], step, offset, symmetric), low, high)
                even += _square(_exact(fourth[j], step, offset, symmetric), low, high)
                sums[j] = odd + even
    else:
        for i in range(count):
            row, sums = numbers[i], terms[i]
            for j in range(width):
                sums[j] = _square(_exact(row[j], inverse[j], zero[j], symmetric), low, high)
    while count > 1:
        half = count // 2
        count -= half
        for i in range(half):
            into, other = terms[i], terms[count + i]
            for j in range(width):
                into[j] += other[j]


@_compiled
def _pack(pairs: Any, packed: Any) -> None:
    for i in range(len(packed)):
        packed[i] = (pairs[i] & np.uint16(15)) | ((pairs[i] >> np.uint16(4)) & np.uint16(240))
