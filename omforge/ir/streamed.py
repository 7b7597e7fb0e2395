"""Tensors that are computed when they are read or written, piece by piece."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
T = TypeVar("T")

Write = Callable[[int, bytes | memoryview], None]
"""Told a piece's first byte in the tensor, and the piece, which is valid during the call only."""

_SUBBYTE = {4}
"""Bits of the element types whose numpy form has one element a byte, and ONNX's form more."""


class StreamedTensor(ir.LazyTensor):
    """A tensor whose bytes come from `pieces()`; nothing is computed before it is asked for.

    Args:
        dtype: Of the elements.
        shape: Of the whole.
        name: Of the tensor.
    """

    def __init__(self, dtype: ir.DataType, shape: Sequence[int], name: str = "") -> None:
        self._sizes = tuple(shape)
        super().__init__(self._whole, dtype=dtype, shape=ir.Shape(self._sizes), name=name)

    @property
    def sources(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors that it reads when it is read or written."""
        return ()

    def pieces(self) -> Iterator[bytes]:
        """The bytes in order, as ONNX stores them: little endian, 4-bit elements two a byte."""
        raise NotImplementedError(f"{type(self).__name__}.pieces")

    def store(self, write: Write) -> None:
        """Hand over all bytes, each piece with its place; `write` may come from several threads.

        For those that compute on threads: a thread that writes what it has computed holds up no
        other one.
        """
        done = 0
        for piece in self.pieces():
            write(done, piece)
            done += len(piece)

    def _whole(self) -> ir.TensorProtocol:
        data = np.empty(self.nbytes, np.uint8)
        done = 0
        for piece in self.pieces():
            data[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        if self.dtype.bitwidth in _SUBBYTE:
            return ir.PackedTensor(data, self.dtype, shape=ir.Shape(self._sizes), name=self.name)
        return ir.Tensor(data.view(self.dtype.numpy()).reshape(self._sizes), name=self.name)


class ViewTensor(StreamedTensor):
    """The bytes of another tensor, all or some, under another dtype and shape.

    A `WeightWriter` stores both once.

    Args:
        source: The other tensor.
        dtype: Of the elements.
        shape: Of the view.
        name: Of the tensor.
        start: The view's first byte in the source; without it, it is all of the source.
    """

    def __init__(
        self,
        source: ir.TensorProtocol,
        dtype: ir.DataType,
        shape: Sequence[int],
        name: str = "",
        *,
        start: int | None = None,
    ) -> None:
        super().__init__(dtype, shape, name)
        left = source.nbytes - (start or 0)
        if self.nbytes > left or (start is None and self.nbytes != left):
            raise ValueError(
                f"{dtype}{list(shape)} has {self.nbytes} bytes, the tensor under it {left}"
            )
        self.source = source
        self.start = start or 0

    @property
    def sources(self) -> tuple[ir.TensorProtocol, ...]:
        """The other tensor."""
        return (self.source,)

    def pieces(self) -> Iterator[bytes]:
        """The source's own bytes."""
        at, end = 0, self.start + self.nbytes
        for part in _pieces(self.source):
            cut = part[max(self.start - at, 0) : end - at] if end > at else b""
            at += len(part)
            if cut:
                yield cut


def _pieces(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    if isinstance(tensor, StreamedTensor):
        yield from tensor.pieces()
    else:
        yield tensor.tobytes()


def in_order(
    work: Callable[[int], T], count: int, *, threads: int = 2, ahead: int = 4
) -> Iterator[T]:
    """Yield work(0), work(1) …, computed on several threads, at most `ahead` of them at a time.

    numpy lets go of the interpreter inside its loops, so two threads are two cores. The threads
    stay for the next call, as a model has hundreds of weights; `work` must not call this itself.
    """
    if count <= 1:
        yield from (work(index) for index in range(count))
        return
    pool = _pool(threads)
    waiting: list[Future[T]] = []
    try:
        for index in range(count):
            waiting.append(pool.submit(work, index))
            if len(waiting) >= ahead:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        # What has begun may read a file that the caller closes.
        wait([future for future in waiting if not future.cancel()])


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="omforge")
