"""Unsigned integers as signed ones, and back: half their range turns one bit of each over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from omforge import ir
from omforge.ir.streamed import StreamedTensor, ViewTensor, Write
from omforge.ir.tensor_reader import TensorReader
from omforge.ir.values import tensor_shape
from omforge.rewriting.builder import Builder

_PIECE = 1 << 20
"""Bytes that are turned at once."""

_TURN: dict[int, int] = {8: 0x80, 4: 0x88}
"""The highest bit of each integer in a byte, by the bits of an integer."""


_UNSIGNED = {ir.DataType.INT4: ir.DataType.UINT4, ir.DataType.INT8: ir.DataType.UINT8}


class SignedCodes(StreamedTensor):
    """Rows of unsigned integers as signed ones, each less by half its range; signed ones as are.

    Args:
        source: UINT8, which may hold two integers, UINT4 or INT4.
        dtype: INT8 or INT4.
        shape: As many integers as the source; or [N, K], both rows a whole number of bytes, where
            what a row of the source has behind K is left out.
        name: Of the tensor.
    """

    def __init__(
        self, source: ir.TensorProtocol, dtype: ir.DataType, shape: Sequence[int], name: str
    ) -> None:
        super().__init__(dtype, shape, name)
        self.source = source
        # Without a rest to leave out, where a row ends does not matter.
        self._rows = self.nbytes if source.nbytes == self.nbytes else shape[0]
        signed = source.dtype == ir.DataType.INT4
        self._turn = np.uint8(0 if signed else _TURN[dtype.bitwidth])

    @property
    def sources(self) -> tuple[ir.TensorProtocol, ...]:
        """The unsigned integers."""
        return (self.source,)

    def pieces(self) -> Iterator[bytes]:
        """Some rows at a time."""
        if not self.nbytes:
            return
        stored, used = self.source.nbytes // self._rows, self.nbytes // self._rows
        step = max(1, _PIECE // stored)
        with TensorReader(_as_bytes(self.source)) as reader:
            for start in range(0, self._rows, step):
                stop = min(start + step, self._rows)
                rows = reader.read(start * stored, stop * stored).reshape(-1, stored)
                yield (rows[:, :used] ^ self._turn).tobytes()


class UnsignedCodes(StreamedTensor):
    """Signed integers as unsigned ones, each more by half their range.

    Args:
        source: INT8 or INT4.
    """

    def __init__(self, source: ir.TensorProtocol) -> None:
        self.source = source
        self._turn = np.uint8(_TURN[source.dtype.bitwidth])
        super().__init__(_UNSIGNED[source.dtype], tensor_shape(source), source.name or "")

    @property
    def sources(self) -> tuple[ir.TensorProtocol, ...]:
        """The signed integers."""
        return (self.source,)

    def pieces(self) -> Iterator[bytes]:
        """The source's own pieces."""
        if isinstance(self.source, StreamedTensor):
            yield from map(self._turned, self.source.pieces())
            return
        with TensorReader(_as_bytes(self.source)) as reader:
            for start in range(0, self.nbytes, _PIECE):
                part = reader.read(start, min(start + _PIECE, self.nbytes))
                yield (part.view(np.uint8) ^ self._turn).tobytes()

    def store(self, write: Write) -> None:
        """On the source's threads, if it computes on some."""
        if isinstance(self.source, StreamedTensor):
            self.source.store(lambda at, piece: write(at, self._turned(piece)))
        else:
            super().store(write)

    def _turned(self, piece: bytes | memoryview) -> bytes:
        return (np.frombuffer(piece, np.uint8) ^ self._turn).tobytes()


def signed_initializer(
    op: Builder, source: ir.TensorProtocol, dtype: ir.DataType, shape: Sequence[int], name: str
) -> ir.Value:
    """An initializer of `SignedCodes`; what reads the same source has one, or views of one.

    Args:
        op: Records the initializer.
        source: As `SignedCodes` takes it, as the others.
        dtype: Of the result.
        shape: Of the result.
        name: Of the initializer.
    """
    made = SignedCodes(source, dtype, shape, name)
    for value in op.graph.initializers.values():
        known = value.const_value
        under = known.source if isinstance(known, ViewTensor) else known
        if not isinstance(under, SignedCodes) or under.source is not source:
            continue
        if under.dtype == dtype and tensor_shape(under) == tuple(shape):
            if under is known:
                return value
            made = under
    return op.constant(made, name)


def _as_bytes(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor that numpy can see bytes of: two integers of 4 bits in one of 8."""
    if tensor.dtype.bitwidth == 8 or isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.Tensor(np.frombuffer(tensor.tobytes(), np.uint8))
