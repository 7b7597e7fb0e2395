"""The file that holds the large tensors, and what the system is told about mapped ones."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from omforge import ir
from omforge.ir import weights
from omforge.ir.streamed import StreamedTensor, Write
from omforge.ir.weights import SAMPLE, STRIDE, TensorReader, external_like, release


def mapped(tmp_path: Path, offset: int, count: int) -> tuple[onnx_ir.ExternalTensor, np.ndarray]:
    numbers = np.arange(count, dtype=np.float32)
    (tmp_path / "w.bin").write_bytes(bytes(offset) + numbers.tobytes())
    return external_like(onnx_ir.tensor(numbers, name="w"), tmp_path, "w.bin", offset), numbers


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


@pytest.mark.parametrize("kind", ["file", "mapped", "memory"])
def test_parts_of_a_tensor_are_read(tmp_path: Path, kind: str) -> None:
    tensor, numbers = mapped(tmp_path, 64, 5000)
    source: onnx_ir.TensorProtocol = tensor
    if kind == "mapped":
        tensor.numpy()
    elif kind == "memory":
        source = onnx_ir.tensor(numbers.reshape(50, 100).T)  # not in C order
        numbers = np.ascontiguousarray(numbers.reshape(50, 100).T).reshape(-1)
    with TensorReader(source) as reader:
        for first, last in ((0, 5000), (10, 20), (4999, 5000), (7, 7)):
            part = reader.read(4 * first, 4 * last, ahead=4 * last).view(np.float32)
            np.testing.assert_array_equal(part, numbers[first:last])


def test_a_mapped_tensor_is_read_from_its_mapping(tmp_path: Path) -> None:
    """Its file's name may belong to another file by now."""
    tensor, numbers = mapped(tmp_path, 0, 100)
    tensor.numpy()
    (tmp_path / "other.bin").write_bytes(bytes(400))
    (tmp_path / "other.bin").replace(tmp_path / "w.bin")
    with TensorReader(tensor) as reader:
        np.testing.assert_array_equal(reader.read(0, 400).view(np.float32), numbers)


def test_what_the_system_does_by_halves_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read or a write may take a part of what it is given."""
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(
        os,
        "preadv",
        lambda file, parts, *at: preadv(file, [parts[0][: len(parts[0]) // 2 + 1]], *at),
    )
    monkeypatch.setattr(
        os, "pwrite", lambda file, data, at: pwrite(file, data[: len(data) // 2 + 1], at)
    )
    tensor, numbers = mapped(tmp_path, 64, 100)
    with TensorReader(tensor) as reader:
        np.testing.assert_array_equal(reader.read(0, 400).view(np.float32), numbers)
    with ir.WeightWriter(tmp_path / "copy.bin") as writer:
        writer.add(onnx_ir.tensor(numbers))
    assert (tmp_path / "copy.bin").read_bytes() == numbers.tobytes()


@pytest.mark.parametrize("offset", [0, 64, 4096, 5000])
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_a_file_that_is_large_beside_memory_is_read_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, in_memory: bool, refused: bool
) -> None:
    """In whole blocks, if that can be; what is in memory is taken from there."""
    preadv, direct = os.preadv, os.open
    seen: list[int] = []

    def read(file: int, parts: list[memoryview], at: int, flags: int = 0) -> int:
        (part,) = parts
        if flags and not in_memory:
            raise BlockingIOError
        if flags:
            return preadv(file, parts, at)
        if file == reader._direct:
            seen.append(len(part))
            address = np.frombuffer(part, np.uint8).ctypes.data
            assert (address % 4096, at % 4096, len(part) % 4096) == (0, 0, 0)
            if refused:
                raise OSError(errno.EINVAL, "no")
        return preadv(file, parts, at)

    monkeypatch.setattr(weights, "_memory", lambda: 0)
    monkeypatch.setattr(weights, "_NOWAIT", 1)
    monkeypatch.setattr(weights, "_open_direct", lambda path: direct(path, os.O_RDONLY))
    monkeypatch.setattr(os, "preadv", read)
    tensor, numbers = mapped(tmp_path, offset, 9000)
    with TensorReader(tensor) as reader:
        for first, last in ((0, 9000), (10, 5000), (4095, 4097), (8999, 9000)):
            part = reader.read(4 * first, 4 * last, ahead=4 * last).view(np.float32)
            np.testing.assert_array_equal(part, numbers[first:last])
    assert bool(seen) is not in_memory


def test_a_small_file_is_read_through_the_cache(tmp_path: Path) -> None:
    """It may be read again."""
    tensor, _ = mapped(tmp_path, 0, 100)
    with TensorReader(tensor) as reader:
        assert reader._direct is None


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    tensor, _ = mapped(tmp_path, 0, 100)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ir.OmforgeError, match=r"cannot read .*w\.bin, which holds tensor w"):
        TensorReader(tensor)


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    tensor, _ = mapped(tmp_path, 0, 100)
    (tmp_path / "w.bin").write_bytes(bytes(300))
    with (
        TensorReader(tensor) as reader,
        pytest.raises(ir.OmforgeError, match="ends inside tensor w") as caught,
    ):
        reader.read(0, 400)
    assert "100 of its 400 bytes are missing" in str(caught.value)


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
