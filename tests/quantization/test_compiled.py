"""The compiled loops make what numpy makes, bit for bit."""

import logging
import sys
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omforge import ir
from omforge.quantization import blockwise, tensors
from omforge.quantization.blockwise import Scheme, quantize, widened
from omforge.quantization.tensors import QuantizedWeight

pytest.importorskip("numba", reason="the compiled loops need numba, the extra `fast`")

from omforge.quantization import compiled

SCHEMES = [
    Scheme(bits, 32, symmetric, clip)
    for bits in (4, 8)
    for symmetric in (True, False)
    for clip in ("none", "mse")
]
DTYPES = [np.float16, np.float32, ml_dtypes.bfloat16]
SCALES = (1e-9, 1e-7, 3e-5, 0.02, 1.0, 9000.0)
"""Of weights: scales that are 0, subnormal, usual, and near the largest of float16."""


@pytest.fixture(autouse=True)
def for_every_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tensors, "_WORTH", 0)
    loops = tensors._loops
    loops.cache_clear()
    yield
    loops.cache_clear()


def some_weights(shape: tuple[int, ...], seed: int, scale: float, dtype: type) -> np.ndarray:
    """Heavy tails; some groups all zero, some of one sign, some zeros negative."""
    rng = np.random.default_rng(seed)
    weights = np.clip(rng.standard_t(3, shape) * scale, -65000, 65000)
    weights[rng.random(shape) < 0.1] = -0.0
    rows = rng.random(shape[0])
    weights[rows < 0.1] = 0
    weights[rows > 0.9] = np.abs(weights[rows > 0.9])
    return weights.astype(np.float32).astype(dtype)


def stored(array: np.ndarray, axis: int, scheme: Scheme) -> list[bytes]:
    weight = QuantizedWeight(onnx_ir.tensor(array, name="w"), axis, scheme)
    parts = [weight.codes, weight.scale, *([weight.zero_point] if weight.zero_point else [])]
    return [part.tobytes() for part in parts]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    group=st.sampled_from((0, 16, 24, 32, 33, 64, 128)),
    along=st.booleans(),
    scale=st.sampled_from(SCALES),
    seed=st.integers(0, 99),
)
def test_every_byte_is_numpy_s(
    dtype: type,
    scheme: Scheme,
    rows: int,
    columns: int,
    group: int,
    along: bool,
    scale: float,
    seed: int,
) -> None:
    array = some_weights((rows, columns) if along else (columns, rows), seed, scale, dtype)
    scheme = Scheme(scheme.bits, group, scheme.symmetric, scheme.clip)
    fast = stored(array, int(along), scheme)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_loops", lambda: None)
        assert fast == stored(array, int(along), scheme)


@pytest.mark.parametrize("axis", [1, 2])
def test_experts_side_by_side_too(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    array = some_weights((3, 96, 80), 1, 0.02, np.float16)
    fast = stored(array, axis, Scheme(4, 64, False))
    monkeypatch.setattr(tensors, "_loops", lambda: None)
    assert fast == stored(array, axis, Scheme(4, 64, False))


def test_loops_are_taken_for_large_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = compiled.quantize_rows

    def counted(weights: np.ndarray, *rest: object) -> object:
        calls.append(weights.size)
        return real(weights, *rest)

    monkeypatch.setattr(compiled, "quantize_rows", counted)
    monkeypatch.setattr(tensors, "_WORTH", 1024)
    for rows in (8, 7):
        stored(np.ones((rows, 128), np.float32), 1, Scheme())
    assert sum(calls) == 1024


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan, 65536.0, -65536.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_not_finite_is_refused(bad: float, dtype: type, axis: int) -> None:
    array = np.ones((64, 64), dtype)
    with np.errstate(over="ignore"):  # 65536 is infinite in float16
        array[33, 40] = bad
    with pytest.raises(ir.InputError, match=r"w cannot be quantised: .*not all finite"):
        stored(array, axis, Scheme(4, 32))


def test_the_largest_float16_is_taken() -> None:
    array = np.full((2, 32), -65504, np.float16)
    assert stored(array, 1, Scheme(4, 32))[0] == bytes([0x88]) * 32


def test_scales_are_rounded_as_numpy_rounds_to_float16() -> None:
    """All numbers of float16, those halfway between two of them, and the neighbours of those."""
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    halfway = (exact[:-1] + exact[1:]) / 2
    both = np.concatenate([exact, halfway])
    raw = np.concatenate([both, np.nextafter(both, np.float32(1e9)), np.nextafter(both, -1)])
    raw = raw[(raw >= 0) & (raw < 65504)]
    made, zero = np.empty_like(raw), np.empty_like(raw)
    one = np.float32(1)
    compiled._grid(-raw, raw, one, -one, one, True, made, zero)
    np.testing.assert_array_equal(made, blockwise.storable(raw))


def test_the_sum_of_errors_has_one_order() -> None:
    """Groups along rows and along columns, and numpy, clip in the same way."""
    weights = some_weights((64, 128), 5, 0.02, np.float32)
    scheme = Scheme(4, 128)
    codes, turned = np.empty((64, 128), np.int8), np.empty((128, 64), np.int8)
    along, _ = compiled.quantize_rows(weights, scheme, codes)
    down, _ = compiled.quantize_columns(weights.T, scheme, turned)
    np.testing.assert_array_equal(along.ravel(), down.ravel())
    np.testing.assert_array_equal(codes, turned.T)
    np.testing.assert_array_equal(codes, quantize(widened(weights), 1, scheme).codes)


@pytest.mark.parametrize("size", [24, 32, 33, 64, 128])
def test_a_row_s_errors_are_summed_in_numpy_s_order(size: int) -> None:
    """In another order the last bits differ, and with them what is clipped where two are equal."""
    whole = size in (32, 64, 128)

    @compiled.numba.njit
    def loss(numbers: np.ndarray, first: int, inverse: float, offset: float) -> float:
        low, high = np.float32(-8), np.float32(7)
        if whole:
            return compiled._vector_loss(numbers, first, inverse, offset, low, high, size)
        part, terms = numbers[first : first + size], np.empty(size, np.float32)
        return compiled._loss(part, inverse, offset, low, high, False, terms)

    groups = some_weights((50, size), size, 1.0, np.float32)
    for offset in np.float32([0, 3]):
        shape = (1, len(groups))
        grid = np.full(shape, 0.25, np.float32), np.full(shape, offset, np.float32)
        expected = blockwise._squared_error(groups.T, *grid, Scheme(symmetric=False), None)[0]
        found = [loss(groups.reshape(-1), size * row, np.float32(4), offset) for row in range(50)]
        np.testing.assert_array_equal(np.float32(found) / 16, expected)


def test_packing_is_numpy_s() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (6, 5)).astype(np.int8)
    packed = np.empty(15, np.uint8)
    compiled.pack(codes, packed)
    assert packed.tobytes() == blockwise.pack(codes, 4)


def test_without_numba_numpy_does_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    array = some_weights((16, 64), 0, 0.02, np.float16)
    fast = stored(array, 1, Scheme(4, 32))
    monkeypatch.setitem(sys.modules, compiled.__name__, None)
    monkeypatch.delattr(sys.modules[compiled.__package__ or ""], "compiled")
    tensors._loops.cache_clear()
    with caplog.at_level(logging.INFO):
        assert stored(array, 1, Scheme(4, 32)) == fast
        stored(array, 1, Scheme(4, 32))
    assert len(caplog.messages) == 1
    assert "weights are quantised by numpy" in caplog.text


def test_where_no_cache_can_be_written_it_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = compiled.numba.njit
    real(lambda number: number)(1)  # numba compiles parts of itself for the first one

    def refuses(cache: bool = False, **options: bool) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(compiled.numba, "njit", refuses)
    doubled = compiled._compiled(lambda number: number + number)
    assert doubled(2) == 4
