"""Parts of tensors come whole, from memory, a mapping, the cache or the disk."""

import errno
import os
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from omforge import ir
from omforge.ir import tensor_reader
from omforge.ir.tensor_reader import TensorReader
from tests.ir.external import mapped


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
@pytest.mark.parametrize("direct", ["whole", "a block at a time", "refused"])
def test_a_file_that_is_large_beside_memory_is_read_past_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, in_memory: bool, direct: str
) -> None:
    """In whole blocks, if that can be; what is in memory is taken from there."""
    preadv = os.preadv
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
            if direct == "refused":
                raise OSError(errno.EINVAL, "no")
            if direct != "whole":
                return preadv(file, [part[:4096]], at)
        return preadv(file, parts, at)

    monkeypatch.setattr(tensor_reader, "_memory", lambda: 0)
    monkeypatch.setattr(tensor_reader, "_NOWAIT", 1)
    monkeypatch.setattr(tensor_reader, "_open_direct", lambda path: os.open(path, os.O_RDONLY))
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
