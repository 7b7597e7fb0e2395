"""Quantised weights as tensors that are computed when they are written, a few groups at a time.

The integers, scales and zero points of a weight come from one reading of it. Nothing of the size of
the weight is in memory, but for one scale for each output, which needs a whole column at a time.
Scales and zero points stay, so that several graphs can share them: 3 bytes for each group.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.streamed import StreamedTensor, Write, in_order
from omforge.ir.tensor_reader import TensorReader
from omforge.ir.values import tensor_shape
from omforge.quantization.blockwise import (
    Quantizer,
    Scheme,
    pack,
    packed_integers,
    quantize,
    widened,
)

Array = npt.NDArray[Any]

log = logging.getLogger(__name__)

_BLOCK = 1 << 19
"""Weights that numpy computes at once: a few float32 arrays of them fit the cache of a core."""

_PIECE = 1 << 20
"""Weights that a thread takes at once: enough to forget what starting it costs."""

_AHEAD = 12
"""Pieces that the system is asked to read before they are needed: a disk's reply takes a while."""

_THREADS = 3
"""One for each of two cores, and one that waits for the disk, or for its turn to write a file."""

_WORTH = 1 << 18
"""Weights from which compiled loops are used: a small model must not wait for their loading."""

_Piece = tuple[memoryview, Array, Array]
"""Packed integers, scales and zero points of some rows; the integers in a buffer of the thread."""


@dataclass(frozen=True)
class _Part:
    """Rows first..last of a weight as a matrix."""

    first: int
    last: int


class _Buffers(threading.local):
    """Of a thread: a new one for each piece would be faulted in, page by page."""

    def __init__(self) -> None:
        self._found: dict[str, Array] = {}

    def get(self, name: str, size: int, dtype: npt.DTypeLike) -> Array:
        """Return [size], its content undefined."""
        buffer = self._found.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._found[name] = np.empty(size, dtype)
        return buffer[:size]


_buffers = _Buffers()


@functools.cache
def _loops() -> ModuleType | None:
    """The compiled loops, if there is what compiles them."""
    try:
        from omforge.quantization import compiled
    except ImportError as error:
        log.info("weights are quantised by numpy, as there are no compiled loops: %s", error)
        return None
    log.debug("weights are quantised by compiled loops: numba %s", compiled.numba.__version__)
    return compiled


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
        self._compiled: ModuleType | None = None
        self._scale: Array | None = None
        self._zero: Array | None = None
        name, shape = source.name or "weight", self.scale_shape
        self.codes: ir.TensorProtocol = _Codes(self, f"{name}_quantized")
        self.scale: ir.TensorProtocol = self.scale_as(ir.DataType.FLOAT)
        self.zero_point: ir.TensorProtocol | None = None
        if not scheme.symmetric:
            self.zero_point = ir.LazyTensor(
                lambda: packed_integers(
                    self._parameters()[1].astype(np.int8), scheme.dtype, f"{name}_zero_point"
                ),
                dtype=scheme.dtype,
                shape=ir.Shape(shape),
                name=f"{name}_zero_point",
            )

    def scale_as(self, dtype: ir.DataType) -> ir.TensorProtocol:
        """The scales in a type that holds float16's numbers exactly, or rounds them."""
        name = f"{self.source.name or 'weight'}_scale"
        return ir.LazyTensor(
            lambda: ir.Tensor(self._parameters()[0].astype(dtype.numpy(), copy=False), name=name),
            dtype=dtype,
            shape=ir.Shape(self.scale_shape),
            name=name,
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

        def copied(_: int, piece: _Piece) -> tuple[bytes, Array, Array]:
            return bytes(piece[0]), *piece[1:]

        yield from self._computed(copied)

    def store(self, write: Write) -> None:
        """Hand over the integers' bytes, from the threads that compute them."""

        def written(start: int, piece: _Piece) -> tuple[bytes, Array, Array]:
            write(start, piece[0])
            return b"", *piece[1:]

        for _ in self._computed(written):
            pass

    def _computed(
        self, finish: Callable[[int, _Piece], tuple[bytes, Array, Array]]
    ) -> Iterator[bytes]:
        """Compute all pieces; `finish` is told each one's first byte, by the thread that has it."""
        if self._quantizer is quantize and math.prod(self.shape) >= _WORTH:
            loops = _loops()
            if loops is not None and loops.supports(self.source.dtype.numpy()):
                self._compiled = loops
        matrix, parts = self._plan()
        scales: list[Array] = []
        zeros: list[Array] = []
        with TensorReader(self.source) as reader:

            def work(index: int) -> tuple[bytes, Array, Array]:
                start = parts[index].first * matrix[1] * self.scheme.bits // 8
                return finish(start, self._piece(matrix, parts, index, reader))

            for data, scale, zero in in_order(
                work, len(parts), threads=_THREADS, ahead=2 * _THREADS
            ):
                if self._report is not None:  # here and not in the threads, which may come together
                    part = parts[len(scales)]
                    self._report(self.source.nbytes // matrix[0] * (part.last - part.first))
                scales.append(scale)
                zeros.append(zero)
                yield data
        self._scale = np.concatenate(scales).reshape(self.scale_shape)
        self._zero = np.concatenate(zeros).reshape(self.scale_shape)

    def _parameters(self) -> tuple[Array, Array]:
        """The scales, float16, and zero points."""
        if self._scale is None or self._zero is None:
            for _ in self.pieces():
                pass
        assert self._scale is not None
        assert self._zero is not None
        return self._scale, self._zero

    def _plan(self) -> tuple[tuple[int, int], list[_Part]]:
        """The shape of the weight as a matrix, and the rows of it that are a piece each."""
        inputs, size = self.shape[self.axis], self.scheme.size(self.shape[self.axis])
        if self.axis == len(self.shape) - 1:  # [.., N, K]: rows are independent
            rows = int(np.prod(self.shape[:-1]))
            matrix = (rows, inputs)
            total = rows * inputs
            pieces = max(-(-total // _PIECE), min(4, 8 * total // _PIECE), 1)  # for all cores
            step = -(-rows // pieces // 2) * 2
            parts = [_Part(start, min(start + step, rows)) for start in range(0, rows, step)]
        else:  # [.., K, N]: a piece is the rows of some groups
            outputs = self.shape[-1]
            matrix = (int(np.prod(self.shape[:-1])), outputs)
            step = size * max(1, _PIECE // (size * outputs))
            parts = [
                _Part(first + start, first + min(start + step, inputs))
                for first in range(0, matrix[0], inputs)
                for start in range(0, inputs, step)
            ]
        odd = [(part.last - part.first) * matrix[1] % 2 for part in parts[:-1]]
        if self.scheme.bits == 4 and any(odd):  # pieces that do not end on a byte
            parts = [_Part(0, matrix[0])]
        return matrix, parts

    def _piece(
        self, matrix: tuple[int, int], parts: Sequence[_Part], index: int, reader: TensorReader
    ) -> _Piece:
        part = parts[index]
        width = self.source.nbytes // matrix[0]
        shape = (part.last - part.first, matrix[1])
        ahead = parts[min(index + _AHEAD, len(parts)) - 1].last
        read = reader.read(part.first * width, part.last * width, ahead=ahead * width)
        rows = read.view(self.source.dtype.numpy()).reshape(shape)
        codes = _buffers.get("codes", math.prod(shape), np.int8).reshape(shape)
        try:
            scale, zero = self._quantized(rows, codes)
            scale = scale.astype(np.float16)  # exact, and they stay in memory
        except InputError as error:
            raise InputError(
                f"{self.source.name} cannot be quantised",
                f"{error.what}: {error.why}",
                error.next_step,
            ) from error
        if self._compiled is None or self.scheme.bits == 8 or codes.size % 2:
            return memoryview(pack(codes, self.scheme.bits)), scale, zero
        packed = _buffers.get("packed", codes.size // 2, np.uint8)
        self._compiled.pack(codes, packed)
        return packed.data, scale, zero

    def _quantized(self, rows: Array, codes: Array) -> tuple[Array, Array]:
        """Scales and zero points of some rows; writes `codes`."""
        along = self.axis == len(self.shape) - 1
        group = self.scheme.size(self.shape[self.axis])
        # Neither a group nor a matrix of several ends within another's rows.
        inputs = self.shape[self.axis]
        made: list[tuple[Array, Array]] = []
        start = 0
        while start < len(rows):
            size = len(rows) if along else min(group, inputs - start % inputs)
            part, written = rows[start : start + size], codes[start : start + size]
            if self._compiled is None:
                made.append((self._rows if along else self._columns)(part, written))
            elif along:
                made.append(self._compiled.quantize_rows(part, self.scheme, written))
            else:
                made.append(self._compiled.quantize_columns(part, self.scheme, written))
            start += size
        scales, zeros = zip(*made, strict=True)
        return np.concatenate(scales), np.concatenate(zeros)

    def _rows(self, rows: Array, codes: Array) -> tuple[Array, Array]:
        """[n, K]: groups side by side in a row, the last perhaps shorter; some rows at a time."""
        inputs, size = rows.shape[1], self.scheme.size(rows.shape[1])
        whole = inputs // size * size
        step = max(1, _BLOCK // inputs)
        shape = (len(rows), self.scheme.groups(inputs))
        scale, zero = np.empty(shape, np.float32), np.empty(shape, np.int8)
        for start in range(0, len(rows), step):
            where = slice(start, start + step)
            for first, last, length in ((0, whole, size), (whole, inputs, inputs - whole)):
                if first == last:
                    continue
                block = widened(rows[where, first:last])
                part = self._quantizer(block.reshape(len(block), -1, length), 2, self.scheme)
                groups = slice(first // size, -(-last // size))
                codes[where, first:last] = part.codes.reshape(block.shape)
                scale[where, groups], zero[where, groups] = part.scale[..., 0], part.zero[..., 0]
        return scale, zero

    def _columns(self, rows: Array, codes: Array) -> tuple[Array, Array]:
        """[k, N]: the rows are one group; some columns at a time."""
        count = rows.shape[1]
        step = max(64, _BLOCK // len(rows))
        scale, zero = np.empty((1, count), np.float32), np.empty((1, count), np.int8)
        for start in range(0, count, step):
            where = slice(start, start + step)
            part = self._quantizer(widened(rows[:, where]), 0, self.scheme)
            codes[:, where], scale[:, where], zero[:, where] = part.codes, part.scale, part.zero
        return scale, zero


class _Codes(StreamedTensor):
    """The integers of a quantised weight."""

    def __init__(self, weight: QuantizedWeight, name: str) -> None:
        super().__init__(weight.scheme.dtype, weight.shape, name)
        self._weight = weight

    @property
    def sources(self) -> tuple[ir.TensorProtocol, ...]:
        """The weight itself."""
        return (self._weight.source,)

    def pieces(self) -> Iterator[bytes]:
        """Computed from the weight."""
        return self._weight.pieces()

    def store(self, write: Write) -> None:
        """Computed from the weight, and written where it is computed."""
        self._weight.store(write)
