"""A tensor that is another one, element by element, computed when it is read or written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from omforge.ir.streamed import StreamedTensor

Array = npt.NDArray[Any]

_PIECE = 1 << 20


class ElementwiseTensor(StreamedTensor):
    """`function` of every element of `source`; nothing is computed before it is asked for.

    Args:
        source: The tensor to read, mapped or in memory.
        function: From a flat piece of the source to a piece of as many elements of `dtype`.
        dtype: The dtype of the result.
    """

    def __init__(
        self, source: ir.TensorProtocol, function: Callable[[Array], Array], dtype: ir.DataType
    ) -> None:
        shape = tuple(int(dim) for dim in source.shape.numpy())
        super().__init__(dtype, shape, source.name or "")
        self._source = source
        self._function = function

    @property
    def sources(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensor that the function is applied to."""
        return (self._source,)

    def pieces(self) -> Iterator[bytes]:
        """The result's bytes in order, a piece at a time: memory stays at a few pieces."""
        if isinstance(self._source, StreamedTensor) and self._source.dtype.bitwidth >= 8:
            dtype = self._source.dtype.numpy()
            for piece in self._source.pieces():  # the whole is nowhere in memory
                yield self._function(np.frombuffer(piece, dtype)).tobytes()
            return
        flat = self._source.numpy().reshape(-1)
        for start in range(0, flat.size, _PIECE):
            yield self._function(flat[start : start + _PIECE]).tobytes()
