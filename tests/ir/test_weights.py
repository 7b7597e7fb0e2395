"""The file that holds the large tensors, and what the system is told about mapped ones."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from omforge import ir
from omforge.ir.streamed import StreamedTensor, Write
from omforge.ir.weights import SAMPLE, STRIDE, release
from tests.ir.external import mapped


@pytest.mark.parametrize("offset", [0, 64, 5000])
def test_pages_may_be_given_back(tmp_path: Path, offset: int) -> None:
    tensor, numbers = mapped(tmp_path, offset, 5000)
    seen = tensor.numpy()
    for first, last in ((0, tensor.nbytes), (4, 8), (9000, tensor.nbytes), (12, 12)):
        release(tensor, first, last)
        np.testing.assert_array_equal(seen, numbers)


def test_what_is_in_memory_is_let_be() -> None:
    tensor = onnx_ir.tensor(np.ones(8, np.float32))
    release(tensor, 0, 32)
    assert tensor.numpy().sum() == 8


class InPieces(StreamedTensor):
    """Bytes in pieces of another size than other tensors have."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(onnx_ir.DataType.UINT8, (len(data),), "pieces")
        self._data, self._size = data, size

    def pieces(self) -> Iterator[bytes]:
        yield from (
            self._data[start : start + self._size]
            for start in range(0, len(self._data), self._size)
        )


class FromTheEnd(InPieces):
    """Hands the last piece over first, as threads may."""

    def store(self, write: Write) -> None:
        for start in reversed(range(0, len(self._data), self._size)):
            write(start, self._data[start : start + self._size])


@pytest.mark.parametrize("size", [7, SAMPLE - 1, SAMPLE, STRIDE - 3, STRIDE, 10 * STRIDE])
def test_equal_bytes_are_stored_once_however_they_come(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(0).bytes(3 * STRIDE + 5)
    with ir.WeightWriter(tmp_path / "w.bin") as writer:
        place = writer.add(onnx_ir.tensor(np.frombuffer(data, np.uint8)))
        assert writer.add(InPieces(data, size)) == place == (0, len(data))
        assert writer.add(FromTheEnd(data, size)) == place
    assert (tmp_path / "w.bin").read_bytes() == data


def test_what_differs_between_the_samples_is_stored_too(tmp_path: Path) -> None:
    """Three tensors with the same samples, one of them twice."""
    tensors: list[np.ndarray] = []
    for place in (SAMPLE, 2 * STRIDE - 1, 3 * STRIDE):
        data = np.zeros(3 * STRIDE, np.uint8)
        data[place : place + 1] = 1
        tensors.append(data)
    with ir.WeightWriter(tmp_path / "w.bin") as writer:
        places = [writer.add(onnx_ir.tensor(data)) for data in (*tensors, tensors[1])]
    assert [offset for offset, _ in places] == [0, 3 * STRIDE, 6 * STRIDE, 3 * STRIDE]
    assert (tmp_path / "w.bin").read_bytes() == b"".join(data.tobytes() for data in tensors)
