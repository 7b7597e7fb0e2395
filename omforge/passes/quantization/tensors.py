"""Quantised weights as tensors that are computed when they are written, a few groups at a time.

The integers, scales and zero points of a weight come from one reading of it. Nothing of the size of
the weight is in memory, but for one scale for each output, which needs a whole column at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.infer import tensor_shape
from omforge.ir.streamed import StreamedTensor, in_order
from omforge.ir.weights import release
from omforge.passes.quantization.blockwise import (
    Quantized,
    Quantizer,
    Scheme,
    pack,
    quantize,
    widened,
)

Array = npt.NDArray[Any]

_PIECE = 1 << 19
"""Weights computed at once: a few float32 arrays of that size fit the cache of a core."""


class QuantizedWeight:
    """The tensors that stand for one weight.

    Args:
        source: The weight, of two dimensions or more, mapped or in memory.
        axis: Its axis K, the one that a product sums over: the last or the last but one.
        scheme: How to store.
        quantizer: How to choose the integers of one group.
        report: Told the bytes of the source that were read, as they are.

    Attributes:
        codes: The integers, of the weight's shape.
        scale: float32, the groups in place of `axis` (one dimension, [N], if there is one group).
        zero_point: As the integers, of the scale's shape; None where the scheme is symmetric.
    """

    def __init__(
        self,
        source: ir.TensorProtocol,
        axis: int,
        scheme: Scheme,
        *,
        quantizer: Quantizer = quantize,
        report: Callable[[int], None] | None = None,
    ) -> None:
        self.source = source
        self.scheme = scheme
        self.shape = tensor_shape(source)
        self.axis = axis % len(self.shape)
        self._quantizer = quantizer
        self._report = report
        self._scale: Array | None = None
        self._zero: Array | None = None
        name = source.name or "weight"
        shape = self.scale_shape
        self.codes: ir.TensorProtocol = _Codes(self, f"{name}_quantized")
        self.scale: ir.TensorProtocol = ir.LazyTensor(
            lambda: ir.Tensor(self._parameters()[0], name=f"{name}_scale"),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(shape),
            name=f"{name}_scale",
        )
        self.zero_point: ir.TensorProtocol | None = None
        if not scheme.symmetric:
            self.zero_point = ir.LazyTensor(
                lambda: _integers(self._parameters()[1], scheme, f"{name}_zero_point"),
                dtype=scheme.dtype,
                shape=ir.Shape(shape),
                name=f"{name}_zero_point",
            )

    @property
    def per_channel(self) -> bool:
        """Whether a column has one scale."""
        return self.scheme.groups(self.shape[self.axis]) == 1

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """[G, N] or [N, G]; [N] where G is 1 and there is no other axis."""
        shape = list(self.shape)
        shape[self.axis] = self.scheme.groups(shape[self.axis])
        if self.per_channel and len(shape) == 2:
            del shape[self.axis]
        return tuple(shape)

    def pieces(self) -> Iterator[bytes]:
        """The integers' bytes in order; the scales are known when the last has come."""
        self.source.numpy()  # maps it, which two threads must not do at once
        work, count = self._plan()
        scales: list[Array] = []
        zeros: list[Array] = []
        for packed, scale, zero in in_order(work, count):
            scales.append(scale)
            zeros.append(zero)
            yield packed
        self._scale = np.concatenate(scales).reshape(self.scale_shape)
        self._zero = np.concatenate(zeros).reshape(self.scale_shape)

    def _parameters(self) -> tuple[Array, Array]:
        if self._scale is None or self._zero is None:
            for _ in self.pieces():
                pass
        assert self._scale is not None
        assert self._zero is not None
        return self._scale, self._zero

    def _plan(self) -> tuple[Callable[[int], tuple[bytes, Array, Array]], int]:
        """What computes piece i, and how many pieces there are."""
        inputs, size = self.shape[self.axis], self.scheme.size(self.shape[self.axis])
        if self.axis == len(self.shape) - 1:  # [.., N, K]: rows are independent
            rows = int(np.prod(self.shape[:-1]))
            step = max(2, _PIECE // inputs // 2 * 2)
            flat = (rows, inputs)
            bounds = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        else:  # [.., K, N]: a piece is the rows of one group
            outputs = self.shape[-1]
            flat = (int(np.prod(self.shape[:-1])), outputs)
            bounds = [
                (first + start, first + min(start + size, inputs))
                for first in range(0, flat[0], inputs)
                for start in range(0, inputs, size)
            ]
        odd = [(b - a) * flat[1] % 2 for a, b in bounds[:-1]]
        if self.scheme.bits == 4 and any(odd):
            return lambda _: self._joined(flat, bounds), 1
        return lambda index: self._packed(self._piece(flat, *bounds[index])), len(bounds)

    def _joined(
        self, flat: tuple[int, int], bounds: Sequence[tuple[int, int]]
    ) -> tuple[bytes, Array, Array]:
        """Everything at once: pieces that do not end on a byte cannot be packed apart."""
        done = [self._piece(flat, *bound) for bound in bounds]
        return (
            pack(np.concatenate([part[0] for part in done]), self.scheme.bits),
            np.concatenate([part[1] for part in done]),
            np.concatenate([part[2] for part in done]),
        )

    def _packed(self, piece: tuple[Array, Array, Array]) -> tuple[bytes, Array, Array]:
        codes, scale, zero = piece
        return pack(codes, self.scheme.bits), scale, zero

    def _piece(self, flat: tuple[int, int], first: int, last: int) -> tuple[Array, Array, Array]:
        """Integers, scales and zero points of rows first..last of the weight as a matrix."""
        rows = self.source.numpy().reshape(flat)[first:last]
        codes = np.empty(rows.shape, np.int8)
        if self.axis == len(self.shape) - 1:
            scale, zero = self._rows(rows, codes)
        else:
            scale, zero = self._columns(rows, codes)
        width = rows.dtype.itemsize * flat[1]
        release(self.source, first * width, last * width)
        if self._report is not None:
            self._report((last - first) * width)
        return codes, scale, zero

    def _rows(self, rows: Array, codes: Array) -> tuple[Array, Array]:
        """[n, K]: groups side by side in a row; the last may be shorter."""
        inputs, size = rows.shape[1], self.scheme.size(rows.shape[1])
        whole = inputs // size * size
        parts: list[Quantized] = []
        if whole:
            block = widened(rows[:, :whole]).reshape(len(rows), -1, size)
            part = self._quantize(block, 2)
            codes[:, :whole] = part.codes.reshape(len(rows), whole)
            parts.append(part)
        if whole < inputs:
            block = widened(rows[:, whole:]).reshape(len(rows), 1, -1)
            part = self._quantize(block, 2)
            codes[:, whole:] = part.codes.reshape(len(rows), -1)
            parts.append(part)
        return (
            np.concatenate([part.scale for part in parts], 1)[..., 0],
            np.concatenate([part.zero for part in parts], 1)[..., 0],
        )

    def _columns(self, rows: Array, codes: Array) -> tuple[Array, Array]:
        """[k, N]: the rows are one group; some columns at a time."""
        count = rows.shape[1]
        step = max(64, _PIECE // len(rows))
        scale, zero = np.empty((1, count), np.float32), np.empty((1, count), np.int8)
        for start in range(0, count, step):
            where = slice(start, start + step)
            part = self._quantize(widened(rows[:, where]), 0)
            codes[:, where], scale[:, where], zero[:, where] = part.codes, part.scale, part.zero
        return scale, zero

    def _quantize(self, block: Array, axis: int) -> Quantized:
        try:
            return self._quantizer(block, axis, self.scheme)
        except InputError as error:
            raise InputError(
                f"{self.source.name} cannot be quantised",
                f"{error.what}: {error.why}",
                error.next_step,
            ) from error


class _Codes(StreamedTensor):
    """The integers of a quantised weight."""

    def __init__(self, weight: QuantizedWeight, name: str) -> None:
        super().__init__(weight.scheme.dtype, weight.shape, name)
        self._weight = weight

    def pieces(self) -> Iterator[bytes]:
        """Computed from the weight."""
        return self._weight.pieces()


def _integers(array: Array, scheme: Scheme, name: str) -> ir.TensorProtocol:
    if scheme.bits == 8:
        return ir.Tensor(array.astype(np.int8), name=name)
    data = np.frombuffer(pack(array.astype(np.int8), 4), np.uint8)
    return ir.PackedTensor(data, scheme.dtype, shape=ir.Shape(array.shape), name=name)
