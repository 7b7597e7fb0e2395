"""Tensors that are computed from another one piece by piece."""

import numpy as np
import onnx_ir
import pytest

from omforge import ir
from omforge.ir.elementwise import ElementwiseTensor

SOURCE = np.arange(10, dtype=np.float32).reshape(2, 5)


def _halved() -> ElementwiseTensor:
    source = onnx_ir.tensor(SOURCE, name="w")
    return ElementwiseTensor(
        source, lambda piece: (piece / 2).astype(np.float16), ir.DataType.FLOAT16
    )


def test_it_looks_like_any_tensor() -> None:
    tensor = _halved()
    assert (tensor.name, tensor.dtype, tensor.nbytes) == ("w", ir.DataType.FLOAT16, 20)
    assert tuple(tensor.shape) == (2, 5)
    np.testing.assert_array_equal(tensor.numpy(), (SOURCE / 2).astype(np.float16))


def test_pieces_are_the_bytes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omforge.ir.elementwise._PIECE", 4)
    tensor = _halved()
    pieces = list(tensor.pieces())
    assert [len(piece) for piece in pieces] == [8, 8, 4]
    assert b"".join(pieces) == tensor.tobytes()


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    calls: list[int] = []

    def count(piece: np.ndarray) -> np.ndarray:
        calls.append(piece.size)
        return piece

    tensor = ElementwiseTensor(onnx_ir.tensor(SOURCE), count, ir.DataType.FLOAT)
    assert tensor.size == 10
    assert not calls
    tensor.tobytes()
    assert sum(calls) == 10
