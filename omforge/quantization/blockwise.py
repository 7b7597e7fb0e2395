"""Blocked round-to-nearest: weights to integers, a scale and perhaps a zero point for each group.

ONNX's `DequantizeLinear` is the definition: w' = (q - zero_point) * scale, with one scale for `g`
neighbours along the reduced axis (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html).

Letters: K inputs of a linear layer, N its outputs, g the group size, G = ceil(K/g) groups.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.errors import InputError

Array = npt.NDArray[Any]
Clip = Literal["none", "mse"]

RATIOS = (0.94, 0.88)
"""Shares of a group's range that clipping tries. Of normal weights in groups of 128, 0.82 and 0.76
besides lessen the squared error by 0.6% with signed scales, and by 0.02% with zero points."""

_OVERFLOW = np.float32(65536)
"""What no float16 reaches."""


@dataclass(frozen=True)
class Scheme:
    """How weights are stored.

    Attributes:
        bits: 8 or 4, two's complement.
        group: Weights along K that share a scale, g; 0 is one scale for each of the N outputs.
        symmetric: Without zero points.
        clip: `mse` gives each group the share of its range with the least squared error.
    """

    bits: Literal[4, 8] = 4
    group: int = 128
    symmetric: bool = True
    clip: Clip = "mse"

    @property
    def signed(self) -> bool:
        """Whether scales have signs: the weight of the greatest size, positive or not, is -8 steps.

        A step is an eighth of it then, where one sign for all would make it a seventh in half of
        the groups. With 8 bits that gains nothing.
        """
        return self.symmetric and self.bits == 4

    @property
    def low(self) -> int:
        """The least integer."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The greatest integer."""
        return (1 << (self.bits - 1)) - 1

    @property
    def dtype(self) -> ir.DataType:
        """Of the integers."""
        return ir.DataType.INT4 if self.bits == 4 else ir.DataType.INT8

    def groups(self, inputs: int) -> int:
        """How many groups K inputs make."""
        return -(-inputs // self.size(inputs))

    def size(self, inputs: int) -> int:
        """Weights in a group: g, or all K."""
        return self.group or inputs


@dataclass(frozen=True)
class Quantized:
    """A block of quantised weights, its group axis kept with length 1 in `scale` and `zero`.

    Attributes:
        codes: int8, of the block's shape.
        scale: float32, every number one of float16 too, so that a graph in either has the same;
            negative for some groups of a `signed` scheme.
        zero: int8; all 0 where the scheme is symmetric.
    """

    codes: Array
    scale: Array
    zero: Array


class _Scratch(threading.local):
    """Buffers of a thread: new ones for every block would cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def get(self, name: str, shape: tuple[int, ...]) -> Array:
        """float32, its content undefined."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name] = np.empty(size, np.float32)
        return buffer[:size].reshape(shape)


_scratch = _Scratch()


def widened(weights: Array) -> Array:
    """The weights as float32, in a buffer that this thread's next call uses again.

    float16 goes by its bits, eight times as fast as numpy's conversion: the exponent's bias is
    mended by a product, which is exact, subnormal numbers included. An infinity or a NaN becomes
    65536 or more, which no float16 is.
    """
    wide = _scratch.get("weights", weights.shape)
    if weights.dtype != np.float16:
        np.copyto(wide, weights, casting="unsafe")
        return wide
    bits = wide.view(np.int32)
    np.copyto(bits, weights.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)  # sign and the 15 bits below it
    return np.multiply(wide, np.float32(2.0**112), out=wide)


def quantize(
    weights: Array,
    axis: int,
    scheme: Scheme,
    *,
    importance: Array | None = None,
    ratios: Sequence[float] = RATIOS,
) -> Quantized:
    """Round a block whose axis `axis` is exactly one group to the nearest integers.

    Args:
        weights: float32; changed by nobody.
        axis: The axis that shares a scale.
        scheme: How to store.
        importance: Factors of the squared errors that clipping weighs, broadcast to `weights`.
        ratios: Shares of a group's range that clipping tries besides all of it.

    Raises:
        InputError: A weight is infinite or not a number, or too large for a float16 scale.
    """
    shares = tried(scheme, ratios)
    if len(shares) == 1:
        scale, zero = _grid(*_range(weights, axis), 1.0, scheme)
    else:
        rest = np.moveaxis(weights, axis, 0).shape[1:]
        factors = None
        if importance is not None:
            factors = _lanes(np.broadcast_to(importance, weights.shape), axis, "importance")
        found = _searched(_lanes(weights, axis, "lanes"), scheme, shares, factors)
        scale, zero = (np.moveaxis(part.reshape(1, *rest), 0, axis) for part in found)
    codes = _rounded(weights, scale, zero, scheme)
    return Quantized(codes.astype(np.int8), scale, zero.astype(np.int8))


def tried(scheme: Scheme, ratios: Sequence[float] = RATIOS) -> tuple[float, ...]:
    """The shares of a group's range that are tried, all of it first."""
    return (1.0, *ratios) if scheme.clip == "mse" and scheme.bits == 4 else (1.0,)


def infinite() -> InputError:
    """The error for a group that has no scale."""
    return InputError(
        "the weights are not all finite numbers of float16",
        "a group with an infinity or a NaN has no scale",
        "Repair the export, or keep this layer as it is (keep=...)",
    )


def _range(weights: Array, axis: int) -> tuple[Array, Array]:
    """The least and the greatest weight of each group, its axis kept."""
    low = weights.min(axis, keepdims=True)
    high = weights.max(axis, keepdims=True)
    if not (np.all(low > -_OVERFLOW) and np.all(high < _OVERFLOW)):
        raise infinite()
    return low, high


def _lanes(block: Array, axis: int, name: str) -> Array:
    """A block as [g, groups]: steps then run over many groups at once, and not over a short row."""
    moved = np.moveaxis(block, axis, 0)
    if not moved.flags.c_contiguous:
        lanes = _scratch.get(name, moved.shape)
        np.copyto(lanes, moved)
        moved = lanes
    return moved.reshape(len(moved), -1)


def _searched(
    lanes: Array, scheme: Scheme, shares: Sequence[float], importance: Array | None
) -> tuple[Array, Array]:
    """Scale and zero point [1, groups] of the share with the least squared error."""
    low, high = _range(lanes, 0)
    scale, zero = _grid(low, high, shares[0], scheme)
    least = _squared_error(lanes, scale, zero, scheme, importance)
    for share in shares[1:]:
        other, moved = _grid(low, high, share, scheme)
        error = _squared_error(lanes, other, moved, scheme, importance)
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(scale, other, where=better)
        np.copyto(zero, moved, where=better)
    return scale, zero


def _grid(low: Array, high: Array, ratio: float, scheme: Scheme) -> tuple[Array, Array]:
    """Scale and zero point of a range cut to a share of itself, float32 both."""
    if scheme.signed:
        scale = storable(np.maximum(high, -low) * (np.float32(ratio) / np.float32(-scheme.low)))
        return np.where(high > -low, -scale, scale), np.zeros_like(scale)
    if scheme.symmetric:
        # The negative side has one integer more.
        scale = storable(np.maximum(high / scheme.high, low / scheme.low) * np.float32(ratio))
        return scale, np.zeros_like(scale)
    low = np.minimum(low, 0) * np.float32(ratio)
    high = np.maximum(high, 0) * np.float32(ratio)
    scale = storable((high - low) / (scheme.high - scheme.low))
    zero = np.rint(scheme.low - low / scale)
    return scale, np.clip(zero, scheme.low, scheme.high)


def storable(scale: Array) -> Array:
    """The nearest scales that float16 holds; 1 where that is 0, as a scale must not be.

    Raises:
        InputError: A scale is beyond the range of float16.
    """
    with np.errstate(over="ignore"):
        rounded = scale.astype(np.float16).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise InputError(
            f"a scale of {float(scale.max()):g} is beyond the range of float16",
            "the weights of a layer are too large",
            "Keep this layer as it is (keep=...)",
        )
    rounded[rounded == 0] = 1
    return rounded


def encode(weights: Array, scale: Array, zero: Array, scheme: Scheme) -> Array:
    """The nearest integers, int8."""
    return _rounded(weights, scale, zero, scheme).astype(np.int8)


def decode(codes: Array, scale: Array, zero: Array) -> Array:
    """What `DequantizeLinear` makes of them, float32."""
    return (codes.astype(np.float32) - zero.astype(np.float32)) * scale


def _rounded(weights: Array, scale: Array, zero: Array, scheme: Scheme) -> Array:
    """The nearest integers as float32, in this thread's buffer."""
    codes = np.multiply(weights, np.reciprocal(scale), out=_scratch.get("codes", weights.shape))
    if not scheme.symmetric:
        codes += zero
    np.rint(codes, out=codes)
    return np.clip(codes, np.float32(scheme.low), np.float32(scheme.high), out=codes)


def _squared_error(
    lanes: Array, scale: Array, zero: Array, scheme: Scheme, importance: Array | None
) -> Array:
    """Of each group in [g, groups], [1, groups]."""
    exact = np.multiply(lanes, np.reciprocal(scale), out=_scratch.get("exact", lanes.shape))
    if not scheme.symmetric:
        exact += zero
    codes = np.rint(exact, out=_scratch.get("codes", lanes.shape))
    np.clip(codes, np.float32(scheme.low), np.float32(scheme.high), out=codes)
    codes -= exact
    np.square(codes, out=codes)
    if importance is not None:
        codes *= importance
    return _folded(codes) * np.square(scale)


def _folded(terms: Array) -> Array:
    """The sums over the first axis, kept, in an order of our own: half on half, again and again.

    numpy's order differs with strides and may change; compiled loops have to have the same.
    """
    count = len(terms)
    while count > 1:
        half = count // 2
        count -= half
        terms[:half] += terms[count : count + half]
    return terms[:1]


def pack(codes: Array, bits: int) -> bytes:
    """Integers as ONNX stores them: 4-bit ones two a byte, the first in the low half.

    Args:
        codes: int8, C order; an even number of them where bits is 4, unless they are the last.
        bits: 4 or 8.
    """
    flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat.tobytes()
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    pairs = flat.view("<u2")
    second = pairs >> 4
    second &= 240
    second |= pairs & 15
    return second.astype(np.uint8).tobytes()


Quantizer = Callable[[Array, int, Scheme], Quantized]
"""`quantize`, or another method of the same form."""


def packed_integers(array: Array, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """Integers of one byte and any shape as a tensor of 8 or of 4 bits an element."""
    if dtype.bitwidth == 8:
        return ir.Tensor(array, name=name)
    data = np.frombuffer(pack(array, 4), np.uint8)
    return ir.PackedTensor(data, dtype, shape=ir.Shape(array.shape), name=name)
