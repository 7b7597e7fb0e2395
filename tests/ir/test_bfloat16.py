"""bfloat16 on the CPU: computed in float32, every result a number of bfloat16."""

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.ir.bfloat16 import BFLOAT16, computed_wide, has_bfloat16, is_float
from omforge.ir.ops import reference_model
from omforge.runtime.session import OrtSession
from omforge.testing import outline, parse

Array = npt.NDArray[np.float32]

HEAD = '<ir_version: 10, opset_import: ["" : 16]>\n'


def narrow(array: npt.ArrayLike) -> npt.NDArray[np.generic]:
    return np.asarray(array, np.float32).astype(BFLOAT16)


def rounded(array: Array) -> Array:
    return array.astype(BFLOAT16).astype(np.float32)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float16", True), ("float64", True), (BFLOAT16, True), ("int8", False), ("bool", False)],
)
def test_numpy_does_not_say_that_bfloat16_is_a_float(dtype: object, expected: bool) -> None:
    assert is_float(dtype) is expected  # type: ignore[arg-type]


def test_arithmetic_is_wide_and_movement_is_not() -> None:
    model = parse(
        HEAD
        + """g (bfloat16[2, 2] x, int64[1] i) => (bfloat16[2, 1] y) {
        a = Mul (x, x) b = Transpose (a) c = Add (b, x) y = Gather <axis = 1> (c, i) }"""
    )
    expected = parse(
        HEAD
        + """g (bfloat16[2, 2] x, int64[1] i) => (bfloat16[2, 1] y) {
        x32 = Cast <to = 1> (x) a32 = Mul (x32, x32) a = Cast <to = 16> (a32)
        b = Transpose (a) b32 = Cast <to = 1> (b) c32 = Add (b32, x32) c = Cast <to = 16> (c32)
        y = Gather <axis = 1> (c, i) }"""
    )
    before = outline(model)
    assert outline(computed_wide(model)) == outline(expected)
    assert outline(model) == before


def test_what_has_none_is_left_alone() -> None:
    model = parse(HEAD + "g (float16[2] x) => (float16[2] y) { y = Mul (x, x) }")
    assert not has_bfloat16(model)
    assert computed_wide(model) is model


def test_every_result_is_rounded_once() -> None:
    """To the bit: 1 + 2 ** -7 squared is no number of bfloat16, nor is its sum with a third."""
    model = parse(
        HEAD
        + """g (bfloat16[N, 8] x, bfloat16[8, 8] w)
        => (bfloat16[N, 8] y, bfloat16[N, 8] square) {
        square = Mul (x, x) m = MatMul (square, w) y = Add (m, x) }"""
    )
    stream = np.random.default_rng(0)
    x, w = (narrow(stream.standard_normal(size)) for size in ((3, 8), (8, 8)))
    found = numerics.run(model, {"x": x, "w": w})
    wide, of_w = x.astype(np.float32), w.astype(np.float32)
    square = rounded(wide * wide)
    y = rounded(rounded(square @ of_w) + wide)
    assert (found["y"].dtype, found["square"].dtype) == (BFLOAT16, BFLOAT16)
    np.testing.assert_array_equal(found["square"].astype(np.float32), square)
    np.testing.assert_array_equal(found["y"].astype(np.float32), y)
    assert np.any(wide * wide != square)  # else nothing was rounded


def test_arrays_without_elements_and_without_axes() -> None:
    model = parse(
        HEAD
        + """g (bfloat16[N] x, bfloat16 s) => (bfloat16[N] y, bfloat16 t) {
        y = Mul (x, s) t = Neg (s) }"""
    )
    found = numerics.run(model, {"x": narrow(np.zeros(0)), "s": narrow(3)})
    assert (found["y"].shape, found["t"].shape, float(found["t"])) == ((0,), (), -3.0)


def test_a_target_op_is_rounded_where_it_ends() -> None:
    model = parse(
        HEAD
        + """g (bfloat16[1, 64] x, bfloat16[64] gamma) => (bfloat16[1, 64] y) {
        y, rstd = NPURmsNorm (x, gamma) }"""
    )
    stream = np.random.default_rng(1)
    x, gamma = narrow(stream.standard_normal((1, 64))), narrow(stream.standard_normal(64))
    session = OrtSession(model, lowered=True)
    assert [spec.dtype for spec in (*session.inputs, *session.outputs)] == ["bfloat16"] * 3
    wide = x.astype(np.float32)
    normal = wide / np.sqrt(np.mean(wide * wide, -1, keepdims=True) + 1e-6)
    expected = normal * gamma.astype(np.float32)
    found = session.run({"x": x, "gamma": gamma})["y"].astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=2.0**-8)
    np.testing.assert_array_equal(found, rounded(found))


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    one = np.ones(1, BFLOAT16).view(np.uint16)[0]
    model = parse(
        HEAD
        + f"""g (bfloat16[1, 2] x) => (bfloat16[1, 2] y)
        <bfloat16[2, 2] w = {{{one}, 0, 0, {one}}}> {{ y = MatMul (x, w) }}"""
    )
    ir.save(model, tmp_path / "m.onnx", external="m.bin", threshold=0)
    twin = reference_model(computed_wide(ir.load(tmp_path / "m.onnx")))
    weight = twin.graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    assert weight.dtype == ir.DataType.BFLOAT16
    x = np.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    assert OrtSession(tmp_path / "m.onnx", lowered=True).run({"x": x})["y"].tolist() == x.tolist()
