"""Blocked round-to-nearest, against its definition in plain numpy."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from omforge import ir
from omforge.quantization.blockwise import Quantized, Scheme, decode, pack, quantize, widened

SCHEMES = [
    Scheme(bits, 32, symmetric, clip)
    for bits in (4, 8)
    for symmetric in (True, False)
    for clip in ("none", "mse")
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(weights=hnp.arrays(np.float32, (32, 5), elements=st.floats(-100, 100, width=32)))
def test_every_weight_is_the_nearest_number_of_its_group(
    scheme: Scheme, weights: np.ndarray
) -> None:
    made = quantize(weights, 0, scheme)
    assert scheme.low <= made.codes.min()
    assert made.codes.max() <= scheme.high
    every = np.arange(scheme.low, scheme.high + 1, dtype=np.float32)
    grid = (every[:, None, None] - made.zero) * made.scale
    nearest = np.abs(grid - weights).min(0)
    error = np.abs(decode(made.codes, made.scale, made.zero) - weights)
    # Half a step may go either way in float32.
    np.testing.assert_allclose(error, nearest, atol=1e-5 * float(made.scale.max()), rtol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_never_makes_the_squared_error_larger(symmetric: bool) -> None:
    weights = np.random.default_rng(0).standard_t(4, (128, 64)).astype(np.float32)

    def error(clip: str) -> np.ndarray:
        made = quantize(weights, 0, Scheme(4, 128, symmetric, clip))
        return ((decode(made.codes, made.scale, made.zero) - weights) ** 2).sum(0)

    assert np.all(error("mse") <= error("none") * (1 + 1e-5))
    assert error("mse").sum() < 0.95 * error("none").sum()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weight_of_a_4_bit_group_is_minus_8_steps(sign: int) -> None:
    """Whatever its sign: one scale sign for all would spend a seventh on half of the groups."""
    weights = np.array([[sign * 4.0], [sign * -3.0], [0.5], [0.0]], np.float32)
    made = quantize(weights, 0, Scheme(4, 32, True, "none"))
    assert made.codes[:, 0].tolist() == [-8, 6, -sign, 0]
    assert made.scale.item() == -sign * 0.5
    eight = quantize(weights, 0, Scheme(8, 0, True, "none"))
    assert eight.scale.item() > 0


def test_groups_may_lie_along_any_axis() -> None:
    weights = np.random.default_rng(1).normal(size=(64, 3)).astype(np.float32)
    down = quantize(weights, 0, Scheme())
    along = quantize(np.ascontiguousarray(weights.T), 1, Scheme())
    np.testing.assert_array_equal(down.codes, along.codes.T)
    np.testing.assert_array_equal(down.scale, along.scale.T)


def test_importance_is_weighed_along_any_axis() -> None:
    rng = np.random.default_rng(3)
    weights, importance = rng.standard_t(3, (64, 9)), rng.exponential(size=(64, 1)) ** 2
    weights, importance = weights.astype(np.float32), importance.astype(np.float32)
    scheme = Scheme(4, 64)
    down = quantize(weights, 0, scheme, importance=importance)
    turned = np.ascontiguousarray(weights.T)
    along = quantize(turned, 1, scheme, importance=importance.T)
    np.testing.assert_array_equal(down.codes, along.codes.T)

    def error(made: Quantized) -> float:
        off = decode(made.codes, made.scale, made.zero) - weights
        return float((off**2 * importance).sum())

    assert error(down) < error(quantize(weights, 0, scheme))


def test_scales_are_numbers_of_float16() -> None:
    weights = np.random.default_rng(2).normal(size=(32, 8)).astype(np.float32)
    scale = quantize(weights, 0, Scheme(4, 32)).scale
    np.testing.assert_array_equal(scale, scale.astype(np.float16))


def test_a_group_of_zeros_stays_zero() -> None:
    made = quantize(np.zeros((32, 2), np.float32), 0, Scheme(4, 32, symmetric=False))
    assert np.all(made.scale != 0)
    assert not decode(made.codes, made.scale, made.zero).any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_not_finite_is_refused(bad: float, dtype: type) -> None:
    weights = np.ones((32, 2), dtype)
    weights[3, 1] = bad
    with pytest.raises(ir.InputError, match="not all finite"):
        quantize(widened(weights), 0, Scheme(4, 32))


def test_widening_float16_is_exact_for_every_finite_number() -> None:
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    np.testing.assert_array_equal(widened(finite), finite.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(widened(finite)), np.signbit(finite))


def test_widening_takes_other_floats_too() -> None:
    for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(widened(np.array([1.5, -2], dtype)), [1.5, -2])


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
def test_packing_is_onnx_s(codes: list[int]) -> None:
    import onnx_ir

    packed = np.frombuffer(pack(np.array(codes, np.int8), 4), np.uint8)
    tensor = onnx_ir.PackedTensor(packed, ir.DataType.INT4, shape=[len(codes)])
    np.testing.assert_array_equal(tensor.numpy().astype(np.int8), codes)
