"""Tensors that are computed when they are read or written."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from omforge import ir
from omforge.ir.streamed import StreamedTensor, ViewTensor, in_order


class Counting(StreamedTensor):
    """Bytes 0, 1, 2 ... in pieces of three."""

    def pieces(self) -> Iterator[bytes]:
        data = bytes(range(self.nbytes))
        yield from (data[start : start + 3] for start in range(0, len(data), 3))


def test_the_whole_is_the_pieces_in_order() -> None:
    tensor = Counting(ir.DataType.UINT8, (2, 4), "t")
    np.testing.assert_array_equal(tensor.numpy(), np.arange(8, dtype=np.uint8).reshape(2, 4))


def test_four_bit_elements_are_two_a_byte() -> None:
    tensor = Counting(ir.DataType.INT4, (3, 2), "t")
    assert tensor.nbytes == 3
    # Bytes 0x00, 0x01, 0x02: the first of two elements is the low half.
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8), [[0, 0], [1, 0], [2, 0]])


def test_a_view_has_the_same_bytes() -> None:
    source = Counting(ir.DataType.INT4, (2, 4))
    view = ViewTensor(source, ir.DataType.UINT8, (2, 2))
    np.testing.assert_array_equal(view.numpy(), [[0, 1], [2, 3]])
    plain = ViewTensor(onnx_ir.tensor(np.array([1.0], np.float32)), ir.DataType.INT32, (1,))
    assert plain.numpy()[0] == 0x3F800000


def test_a_view_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="has 6 bytes, the tensor under it 4"):
        ViewTensor(Counting(ir.DataType.INT4, (2, 4)), ir.DataType.UINT8, (2, 3))


def test_a_writer_stores_a_view_and_its_source_once(tmp_path: Path) -> None:
    source = Counting(ir.DataType.INT4, (20, 4))
    with ir.WeightWriter(tmp_path / "w.bin") as writer:
        place = writer.add(source)
        assert writer.add(ViewTensor(source, ir.DataType.UINT8, (20, 2))) == place
        assert writer.add(onnx_ir.tensor(np.arange(40, dtype=np.uint8))) == place
    assert (tmp_path / "w.bin").stat().st_size == 40


def test_a_view_of_a_part_is_stored_inside_its_source(tmp_path: Path) -> None:
    source = Counting(ir.DataType.INT4, (20, 4))
    part = ViewTensor(source, ir.DataType.INT8, (3, 4), "part", start=10)
    np.testing.assert_array_equal(part.numpy().ravel(), np.arange(10, 22))
    plain = onnx_ir.tensor(np.arange(6, dtype=np.float32))
    np.testing.assert_array_equal(
        ViewTensor(plain, ir.DataType.FLOAT, (2,), start=8).numpy(), [2.0, 3.0]
    )
    with pytest.raises(ValueError, match="has 12 bytes, the tensor under it 10"):
        ViewTensor(source, ir.DataType.INT8, (12,), start=30)
    with ir.WeightWriter(tmp_path / "w.bin") as writer:
        offset, _ = writer.add(source)
        assert writer.add(part) == (offset + 10, 12)
    assert (tmp_path / "w.bin").stat().st_size == 40


def test_results_come_in_order_from_several_threads() -> None:
    first = threading.Event()

    def work(index: int) -> int:
        if index == 0:
            assert first.wait(10), "the second piece was not begun beside the first"
        if index == 1:
            first.set()
        return index

    assert list(in_order(work, 20)) == list(range(20))


def test_an_error_ends_it() -> None:
    def work(index: int) -> int:
        if index == 3:
            raise RuntimeError("three")
        return index

    with pytest.raises(RuntimeError, match="three"):
        list(in_order(work, 100))


def test_nothing_runs_on_behind_an_error() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(index: int) -> int:
        if index == 0:
            assert begun.wait(10)
            raise RuntimeError("zero")
        begun.set()
        time.sleep(0.05)
        ended.set()
        return index

    with pytest.raises(RuntimeError, match="zero"):
        list(in_order(work, 2))
    assert ended.is_set()
