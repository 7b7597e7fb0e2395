"""A tensor that is another one, element by element, computed when it is read or written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


class ElementwiseTensor(ir.LazyTensor):
    """`function` of every element of `source`; nothing is computed before it is asked for.

    Args:
        source: The tensor to read, mapped or in memory.
        function: From a flat piece of the source to a piece of as many elements of `dtype`.
        dtype: The dtype of the result.
    """

    def __init__(
        self, source: ir.TensorProtocol, function: Callable[[Array], Array], dtype: ir.DataType
    ) -> None:
        self._sizes = tuple(int(dim) for dim in source.shape.numpy())
        super().__init__(
            self._whole, dtype=dtype, shape=ir.Shape(self._sizes), name=source.name or ""
        )
        self._source = source
        self._function = function

    def pieces(self, elements: int = 1 << 20) -> Iterator[bytes]:
        """The result's bytes in order, `elements` at a time: memory stays at a few pieces."""
        flat = self._source.numpy().reshape(-1)
        for start in range(0, flat.size, elements):
            yield self._function(flat[start : start + elements]).tobytes()

    def _whole(self) -> ir.TensorProtocol:
        array: Array = np.empty(self._sizes, dtype=self.dtype.numpy())
        flat, result = self._source.numpy().reshape(-1), array.reshape(-1)
        for start in range(0, flat.size, 1 << 20):
            piece = slice(start, start + (1 << 20))
            result[piece] = self._function(flat[piece])
        return ir.Tensor(array, name=self.name)
