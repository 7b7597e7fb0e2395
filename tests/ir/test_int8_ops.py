"""Products of int8: the bodies equal their formulas, and scales survive their encoding."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.infer import infer_model
from omforge.ir.int8_ops import decoded_scale, encoded_scale, is_int8_product
from omforge.ir.numerics import run
from omforge.ir.ops import reference_model

HEADER = '<ir_version: 8, opset_import: ["" : 16]>'
RNG = np.random.default_rng(0)
SUMS = RNG.integers(-(2**20), 2**20, (3, 5)).astype(np.int32)
SCALES = (2.0 ** RNG.uniform(-20, -6, 5)).astype(np.float32)


def twin(text: str, feeds: dict[str, Any]) -> np.ndarray:
    model = ir.from_onnx_text(HEADER + text)
    return run(reference_model(model), feeds)["y"]


@given(st.floats(2.0**-126, 2.0**100, width=32))
def test_a_scale_is_rounded_to_ten_bits_of_mantissa(scale: float) -> None:
    (code,) = encoded_scale(np.array([scale], np.float32), flag=False)
    (found,) = decoded_scale(np.array([code]))
    assert code < 1 << 32
    assert code & 0x1FFF == 0
    assert abs(found - scale) <= scale * 2.0**-11
    (flagged,) = encoded_scale(np.array([scale], np.float32), flag=True)
    assert flagged == code | (1 << 46)
    assert decoded_scale(np.array([flagged])) == found


def test_a_tie_goes_to_the_even_mantissa() -> None:
    ties = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11], np.float32)
    np.testing.assert_array_equal(decoded_scale(encoded_scale(ties, flag=False)), [1, 1 + 2.0**-9])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_ascend_quant_computes_in_float16(dtype: type, offset: float) -> None:
    kind = "float16" if dtype is np.float16 else "float"
    x = RNG.normal(size=(4, 7)).astype(dtype) * 40
    scale = np.float32(1 / 0.3)
    text = f"""g ({kind}[4,7] x) => (int8[4,7] y)
        {{ y = AscendQuant <scale = {scale}, offset = {offset}> (x) }}"""
    exact = x.astype(np.float16) * np.float16(scale) + np.float16(offset)
    expected = np.clip(np.rint(exact), -128, 127)
    assert np.abs(expected).max() > 120, "some saturate"
    found = twin(text, {"x": x}).astype(np.int32)
    if offset:  # ONNX Runtime may leave the rounding in front of a sum out
        assert np.abs(found - expected).max() <= 1
    else:
        np.testing.assert_array_equal(found, expected)


def test_halves_go_to_the_even_integer() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)
    text = "g (float[5] x) => (int8[5] y) { y = AscendQuant <scale = 1.0, offset = 0.0> (x) }"
    np.testing.assert_array_equal(twin(text, {"x": x}), [0, 2, 2, 0, -2])


def test_ascend_dequant_reads_the_low_half_of_its_scale() -> None:
    text = """g (int32[3,5] x, uint64[5] s) => (float16[3,5] y)
        { y = AscendDequant <dtype = 1> (x, s) }"""
    codes = encoded_scale(SCALES, flag=False)
    expected = (SUMS * decoded_scale(codes)).astype(np.float16)
    np.testing.assert_array_equal(twin(text, {"x": SUMS, "s": codes}), expected)


@pytest.mark.parametrize("turned", [False, True])
def test_quant_matmul_is_a_product_and_a_scale(turned: bool) -> None:
    x, w = (RNG.integers(-128, 128, shape).astype(np.int8) for shape in ((2, 3, 9), (9, 5)))
    shape, setting = ("5,9", "<transpose_x2 = 1>") if turned else ("9,5", "<dtype = 1>")
    text = f"""g (int8[2,3,9] x, int8[{shape}] w, uint64[5] s) => (float16[2,3,5] y)
        {{ y = QuantBatchMatMul {setting} (x, w, s) }}"""
    codes = encoded_scale(SCALES, flag=True)
    expected = (x.astype(np.int32) @ w.astype(np.int32) * decoded_scale(codes)).astype(np.float16)
    feeds = {"x": x, "w": w.T.copy() if turned else w, "s": codes}
    np.testing.assert_array_equal(twin(text, feeds), expected)


@pytest.mark.parametrize(
    ("inputs", "setting"), [("x, w, s, , b", ""), ("x, w, s", "<dtype = 2>")], ids=["bias", "int8"]
)
def test_other_calls_have_no_reference_body(inputs: str, setting: str) -> None:
    text = f"""g (int8[2,4] x, int8[4,4] w, uint64[4] s, int32[4] b) => (float16[2,4] y)
        {{ y = QuantBatchMatMul {setting} ({inputs}) }}"""
    with pytest.raises(InputError, match="in a way that has no reference body"):
        reference_model(ir.from_onnx_text(HEADER + text))


@pytest.mark.parametrize("turned", [False, True])
def test_a_product_of_int8_gives_int32(turned: bool) -> None:
    body = "t = Transpose (w) y = MatMul (x, t)" if turned else "y = MatMul (x, w)"
    model = ir.from_onnx_text(
        f"{HEADER} g (int8[2,2] x) => (int32[2,2] y) <int8[2,2] w = {{1, 2, 3, -128}}> {{ {body} }}"
    )
    infer_model(model)
    assert model.graph.outputs[0].dtype == ir.DataType.INT32
    assert is_int8_product(model.graph[-1])
    x = np.array([[127, -128], [3, 4]], np.int8)
    w = np.array([[1, 2], [3, -128]])
    found = run(reference_model(model), {"x": x})["y"]
    np.testing.assert_array_equal(found, x.astype(np.int32) @ (w.T if turned else w))
    assert [node.op_type for node in model.graph][-1] == "MatMul", "the model itself stays"


def test_a_product_of_floats_is_none_of_int8() -> None:
    model = ir.from_onnx_text(
        f"{HEADER} g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {{1, 2, 3, 4}}> "
        "{ y = MatMul (x, w) }"
    )
    assert not is_int8_product(model.graph[0])
