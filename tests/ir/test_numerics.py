"""What counts as equal: the table, and NaN, infinities, shapes and large integers."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from omforge import ir
from omforge.ir.numerics import (
    EXACT,
    TOLERANCES,
    Tolerance,
    at_full_accuracy,
    max_abs_diff,
    run,
    tolerance,
    within,
)

INF, NAN = np.inf, np.nan


def floats(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


# -- the table


def test_the_table():
    assert {name: (t.rtol, t.atol) for name, t in TOLERANCES.items()} == {
        "float64": (1e-7, 1e-9),
        "float32": (1e-4, 1e-4),
        "float16": (2e-2, 5e-2),
        "bfloat16": (1e-1, 2e-1),
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_the_table_is_found_by_a_dtypes_name(dtype):
    assert tolerance(np.dtype(dtype).name) is TOLERANCES[np.dtype(dtype).name]


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool", "float8_e4m3fn", "object"])
def test_every_other_dtype_must_be_equal_to_the_bit(dtype):
    assert tolerance(dtype) == EXACT == Tolerance(0.0, 0.0)


def test_a_coarser_dtype_is_allowed_more():
    order = [TOLERANCES[name] for name in ("float64", "float32", "float16", "bfloat16")]
    for finer, coarser in itertools.pairwise(order):
        assert finer.rtol < coarser.rtol
        assert finer.atol < coarser.atol


# -- how far, and near enough


@pytest.mark.parametrize(
    ("actual", "expected", "difference"),
    [
        (floats(1, 2), floats(1, 2), 0.0),
        (floats(1, 2), floats(1, 5), 3.0),
        (floats(-1), floats(1), 2.0),
        (floats(), floats(), 0.0),
        (floats(NAN), floats(NAN), 0.0),
        (floats(NAN), floats(1), INF),
        (floats(1), floats(NAN), INF),
        (floats(NAN, 1), floats(NAN, 3), 2.0),
        (floats(INF, -INF), floats(INF, -INF), 0.0),
        (floats(INF), floats(-INF), INF),
        (floats(INF), floats(1), INF),
        (floats(1), floats(-INF), INF),
        (np.array([1.7e308]), np.array([-1.7e308]), INF),
        (floats(1, 2), floats(1, 2, 3), INF),
        (floats(1), floats(1).reshape(1, 1), INF),
        (np.float32(2), np.float32(5), 3.0),
        (np.int64([2**62]), np.int64([2**62 + 1]), 1.0),
        (np.int64([5, 1]), np.int64([2, 1]), 3.0),
        (np.uint8([0]), np.uint8([255]), 255.0),
        (np.array([True, False]), np.array([True, True]), 1.0),
        (np.float16([1]), np.float32([1]), 0.0),
        (np.array([1.5], ml_dtypes.bfloat16), np.array([1], ml_dtypes.bfloat16), 0.5),
    ],
)
def test_the_largest_difference(actual, expected, difference):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert max_abs_diff(actual, expected) == difference
    assert within(actual, expected, EXACT) is (difference == 0)


LOOSE = Tolerance(rtol=0.1, atol=0.5)


@pytest.mark.parametrize(
    ("actual", "expected", "equal"),
    [
        (floats(0.5), floats(0), True),
        (floats(0.51), floats(0), False),
        (floats(11.4), floats(10), True),  # 0.5 + 0.1 * 10
        (floats(11.6), floats(10), False),
        (floats(10), floats(11.7), False),  # it is the reference that counts: 0.5 + 1.17
        (floats(10), floats(11.6), True),
        (floats(NAN, INF, -INF), floats(NAN, INF, -INF), True),
        (floats(NAN), floats(0), False),
        (floats(0), floats(NAN), False),
        (floats(1e30), floats(INF), False),  # an infinite reference allows no infinite error
        (floats(INF), floats(-INF), False),
        (floats(0, 0, 9), floats(0, 0, 0), False),
        (floats(0, 0), floats(0), False),
        (floats(0).reshape(1, 1), floats(0), False),
        (floats(), floats(), True),
        (np.array([1.7e308]), np.array([-1.7e308]), False),
        (np.int64([11]), np.int64([10]), True),
    ],
)
def test_near_enough(actual, expected, equal):
    assert within(actual, expected, LOOSE) is equal


# -- running


def test_runs_a_model_and_names_its_outputs():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 2] x) => (float[n, 2] z, float[n, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
            y = MatMul (x, w)
            z = Neg (y)
        }""")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    found = run(model, {"x": np.ones((1, 2), np.float32), "ignored": np.ones(1)})
    assert {name: array.tolist() for name, array in found.items()} == {
        "z": [[-4, -6]],
        "y": [[4, 6]],
    }
    assert list(found) == ["z", "y"]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_runs_a_model_with_external_weights_from_any_folder(tmp_path, monkeypatch):
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
            y = MatMul (x, w)
        }""")
    ir.save(model, tmp_path / "m.onnx", external="m.weights", threshold=0)
    loaded = ir.load(tmp_path / "m.onnx")
    monkeypatch.chdir("/")
    assert run(loaded, {"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[4, 6]]
    assert sorted(child.name for child in tmp_path.iterdir()) == ["m.onnx", "m.weights"]


NBITS = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    g (float[n, 32] x, uint8[4, 1, 16] w, float[4, 1] s) => (float[n, 4] y) {
        y = com.microsoft.MatMulNBits <K = 32, N = 4, bits = 4, block_size = 32%s> (x, w, s)
    }"""


def test_what_layers_read_is_not_rounded_where_the_model_allows_it():
    random = np.random.default_rng(0)
    feeds = {
        "x": random.standard_normal((3, 32)).astype(np.float32),
        "w": random.integers(0, 256, (4, 1, 16)).astype(np.uint8),
        "s": np.full((4, 1), 0.1, np.float32),
    }
    exact, coarse = (ir.from_onnx_text(NBITS % text) for text in ("", ", accuracy_level = 4"))
    assert at_full_accuracy(exact) is exact
    copy = at_full_accuracy(coarse)
    assert "accuracy_level" not in next(iter(copy.graph)).attributes
    assert "accuracy_level" in next(iter(coarse.graph)).attributes
    np.testing.assert_array_equal(run(coarse, feeds)["y"], run(exact, feeds)["y"])


def test_a_function_s_layers_run_at_full_accuracy_too():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20, "f" : 1]>
        g (float[n, 32] x, uint8[4, 1, 16] w, float[4, 1] s) => (float[n, 4] y) {
            y = f.product (x, w, s)
        }
        <opset_import: ["" : 20, "com.microsoft" : 1], domain: "f">
        product (x, w, s) => (y) {
            y = com.microsoft.MatMulNBits <K = 32, N = 4, bits = 4, block_size = 32,
                accuracy_level = 4> (x, w, s)
        }""")
    (body,) = at_full_accuracy(model).functions.values()
    assert "accuracy_level" not in next(iter(body)).attributes
