"""Tensors that are others, one behind the other."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.elementwise import ElementwiseTensor
from omforge.ir.stacked import StackedTensor


def _parts(count: int) -> list[ir.TensorProtocol]:
    random = np.random.default_rng(0)
    return [ir.tensor(random.standard_normal((2, 3)).astype(np.float32)) for _ in range(count)]


def test_it_has_a_first_axis_of_the_parts() -> None:
    parts = _parts(3)
    stacked = StackedTensor(parts, "w")
    assert np.array_equal(stacked.numpy(), np.stack([part.numpy() for part in parts]))
    assert stacked.sources == tuple(parts)


def test_it_is_read_part_by_part_behind_a_conversion() -> None:
    """The whole is never in memory: a piece of what is converted is one of what is stacked."""
    parts = _parts(4)
    half = ElementwiseTensor(
        StackedTensor(parts), lambda x: x.astype(np.float16), ir.DataType.FLOAT16
    )
    assert [len(piece) for piece in half.pieces()] == [12] * 4
    assert np.array_equal(half.numpy(), np.stack([p.numpy() for p in parts]).astype(np.float16))


def test_what_is_not_alike_is_refused() -> None:
    other = ir.tensor(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="of 2 kinds"):
        StackedTensor([*_parts(1), other])
