"""A tensor made of others of one shape, one behind the other along a new first axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from omforge.ir.streamed import StreamedTensor
from omforge.ir.weights import chunks


class StackedTensor(StreamedTensor):
    """[E, ..] of E tensors [..], which stay where they are until it is read or written.

    Args:
        parts: Tensors of one dtype and shape; their elements take whole bytes.
        name: Of the tensor.

    Raises:
        ValueError: They are not alike, or there are none.
    """

    def __init__(self, parts: Sequence[ir.TensorProtocol], name: str = "") -> None:
        kinds = {(part.dtype, tuple(int(dim) for dim in part.shape.numpy())) for part in parts}
        if len(kinds) != 1:
            raise ValueError(f"{len(parts)} tensors of {len(kinds)} kinds cannot be stacked")
        ((dtype, shape),) = kinds
        if dtype.bitwidth % 8:
            raise ValueError(f"{dtype} has no whole bytes")
        super().__init__(dtype, (len(parts), *shape), name)
        self._parts = tuple(parts)

    @property
    def sources(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors."""
        return self._parts

    def pieces(self) -> Iterator[bytes]:
        """Each tensor's own bytes, one tensor at a time."""
        for part in self._parts:
            for chunk in chunks(part):
                yield bytes(chunk)
