"""Quantised weights in pieces are what the whole would be."""

import operator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir
import pytest

from omforge import ir
from omforge.quantization import tensors
from omforge.quantization.blockwise import Scheme, decode, quantize
from omforge.quantization.tensors import QuantizedWeight

SHAPES = [
    ((96, 10), 0),
    ((96, 11), 0),
    ((100, 7), 0),  # the last group is shorter
    ((33, 7), 0),  # pieces that do not end on a byte
    ((10, 96), 1),
    ((7, 100), 1),
    ((3, 64, 6), 1),  # experts side by side
    ((2, 33, 5), 1),
]


def dequantized(weight: QuantizedWeight) -> np.ndarray:
    """By the definition of `DequantizeLinear`, from the three tensors."""
    codes = weight.codes.numpy().astype(np.float32)
    scale = weight.scale.numpy()
    zero = np.zeros_like(scale)
    if weight.zero_point is not None:
        zero = weight.zero_point.numpy().astype(np.float32)
    if scale.ndim < codes.ndim:
        scale, zero = (np.expand_dims(x, weight.axis) for x in (scale, zero))
    size = weight.scheme.size(codes.shape[weight.axis])
    groups = np.arange(codes.shape[weight.axis]) // size
    return (codes - np.take(zero, groups, weight.axis)) * np.take(scale, groups, weight.axis)


def expected(array: np.ndarray, axis: int, scheme: Scheme) -> np.ndarray:
    """Group by group, in a loop."""
    moved = np.moveaxis(array.astype(np.float32), axis, 0)
    size = scheme.size(len(moved))
    groups = [moved[start : start + size] for start in range(0, len(moved), size)]
    made = [quantize(np.ascontiguousarray(group), 0, scheme) for group in groups]
    return np.moveaxis(np.concatenate([decode(m.codes, m.scale, m.zero) for m in made]), 0, axis)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 0), Scheme(8, 0), Scheme(8, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_pieces_make_what_the_whole_would(
    shape: tuple[int, ...],
    axis: int,
    scheme: Scheme,
    symmetric: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensors, "_PIECE", 192)
    monkeypatch.setattr(tensors, "_BLOCK", 128)
    scheme = Scheme(scheme.bits, scheme.group, symmetric)
    array = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    weight = QuantizedWeight(onnx_ir.tensor(array, name="w"), axis, scheme)
    assert weight.codes.numpy().shape == shape
    assert weight.scale.numpy().shape == weight.scale_shape
    np.testing.assert_array_equal(dequantized(weight), expected(array, axis, scheme))
    in_order, placed = b"".join(weight.pieces()), bytearray(weight.codes.nbytes)
    weight.store(
        lambda start, piece: operator.setitem(placed, slice(start, start + len(piece)), piece)
    )
    assert placed == in_order


def test_the_tensors_say_what_they_are_before_they_are_computed() -> None:
    def never(*_: object) -> None:
        raise AssertionError("computed")

    source = ir.LazyTensor(never, dtype=ir.DataType.BFLOAT16, shape=ir.Shape([64, 6]), name="w")
    weight = QuantizedWeight(source, 0, Scheme(4, 32, symmetric=False))
    assert weight.zero_point is not None
    told = [
        (t.name, t.dtype, tuple(t.shape)) for t in (weight.codes, weight.scale, weight.zero_point)
    ]
    assert told == [
        ("w_quantized", ir.DataType.INT4, (64, 6)),
        ("w_scale", ir.DataType.FLOAT, (2, 6)),
        ("w_zero_point", ir.DataType.INT4, (2, 6)),
    ]


def test_scales_may_be_asked_for_first() -> None:
    array = np.random.default_rng(0).normal(size=(64, 4)).astype(ml_dtypes.bfloat16)
    first, second = (
        QuantizedWeight(onnx_ir.tensor(array, name="w"), 0, Scheme(4, 32)) for _ in range(2)
    )
    scale = first.scale.numpy()
    second.codes.tobytes()
    np.testing.assert_array_equal(scale, second.scale.numpy())


def test_every_byte_of_the_source_is_reported_once(tmp_path: Path) -> None:
    seen: list[int] = []
    array = np.ones((96, 10), np.float32)
    weight = QuantizedWeight(onnx_ir.tensor(array, name="w"), 0, Scheme(4, 32), report=seen.append)
    with ir.WeightWriter(tmp_path / "w.bin") as writer:
        writer.add(weight.codes)
        writer.add(weight.scale)
    assert sum(seen) == array.nbytes


def test_an_error_names_the_weight() -> None:
    array = np.full((32, 2), np.inf, np.float32)
    weight = QuantizedWeight(onnx_ir.tensor(array, name="h.0.w"), 0, Scheme(4, 32))
    with pytest.raises(ir.InputError, match=r"h\.0\.w cannot be quantised"):
        weight.codes.tobytes()
