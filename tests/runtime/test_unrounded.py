"""Graphs of int8 layers without the rounding of what the layers read."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.int8_ops import encoded_scale
from omforge.ir.numerics import run
from omforge.ir.ops import reference_model
from omforge.runtime.unrounded import without_rounding

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 8)).astype(np.float32)
CODES = RNG.integers(-127, 128, (8, 5)).astype(np.int8)
STEP = np.float32(1 / 64)  # of |x| up to 3 or so, those from 2 on saturate
SCALES = np.exp2(RNG.integers(-9, -6, 5)).astype(np.float32)
EXACT = np.clip(X / STEP, -128, 127) * STEP @ (CODES * SCALES)


def stored(model: ir.Model, **arrays: np.ndarray) -> ir.Model:
    """The model with these inputs stored."""
    for value in list(model.graph.inputs):
        if value.name in arrays:
            tensor = ir.Tensor(arrays[value.name], name=value.name)
            model.graph.inputs.remove(value)
            value.const_value = tensor
            model.graph.register_initializer(value)
    return model


def test_a_canonical_graph_keeps_what_lies_between_two_integers() -> None:
    model = stored(
        ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[3, 8] x, float step, int8[8, 5] codes, float[5] scales) => (float[3, 5] y) {
            q = QuantizeLinear (x, step)
            steps = DequantizeLinear (q, step)
            w = DequantizeLinear <axis = 1> (codes, scales)
            y = MatMul (steps, w)
        }"""),
        step=np.array(STEP),
        codes=CODES,
        scales=SCALES,
    )
    rounded = run(model, {"x": X})["y"]
    found = run(without_rounding(model), {"x": X})["y"]
    np.testing.assert_allclose(found, EXACT, rtol=1e-5, atol=1e-5)
    assert np.abs(rounded - EXACT).max() > 1e-3
    np.testing.assert_array_equal(run(model, {"x": X})["y"], rounded)


CACHE = """<ir_version: 10, opset_import: ["" : 21]>
g (float16[1, 2, 4] new, int8[1, 3, 4] past, float16 low, float16 high)
    => (float16[1, 5, 4] y, int8[1, 2, 4] present, int8[1, 2, 4] other) {
    c = Clip (new, low, high)
    r = Round (c)
    q = Cast <to = 3> (r)
    present = Identity (q)
    wide = Cast <to = 10> (past)
    y = Concat <axis = 1> (wide, c)
    a = Abs (r)
    other = Cast <to = 3> (a)
}"""


def test_a_cache_holds_what_lies_between_two_integers() -> None:
    bounds = {"low": np.float16(-50), "high": np.float16(49)}
    model = stored(ir.from_onnx_text(CACHE), **{k: np.array(v) for k, v in bounds.items()})
    new = np.array([0.5, -3.25, 48.75, -49.5, 80, -90, 0, 1], np.float16).reshape(1, 2, 4)
    past = RNG.normal(size=(1, 3, 4)).astype(np.float16)
    found = run(without_rounding(model), {"new": new, "past": past})
    np.testing.assert_array_equal(found["present"], np.clip(new, -50, 49))
    np.testing.assert_array_equal(found["y"][:, 3:], found["present"])
    np.testing.assert_array_equal(found["y"][:, :3], past)
    # What is int8 for another reason stays so.
    np.testing.assert_array_equal(
        found["other"], np.abs(np.round(np.clip(new, -50, 49))).astype(np.int8)
    )


def test_a_cache_that_the_graph_writes_holds_them_too() -> None:
    text = CACHE.replace('"" : 21', '"" : 24').replace("int8[1, 2, 4] present", "int8[1, 3, 4] all")
    text = text.replace("float16[1, 5, 4] y", "float16[1, 3, 4] y").replace(
        "(float16[1, 2, 4] new,", "(float16[1, 2, 4] new, int64[1] at,"
    )
    text = text.replace(
        "wide = Cast <to = 10> (past)", "all = TensorScatter <axis = 1> (past, present, at)"
    )
    text = text.replace("y = Concat <axis = 1> (wide, c)", "y = Cast <to = 10> (all)")
    bounds = {"low": np.float16(-50), "high": np.float16(49)}
    model = stored(ir.from_onnx_text(text), **{k: np.array(v) for k, v in bounds.items()})
    new = np.array([0.5, -3.25, 48.75, -49.5, 80, -90, 0, 1], np.float16).reshape(1, 2, 4)
    past = RNG.normal(size=(1, 3, 4)).astype(np.float16)
    feeds = {"new": new, "past": past, "at": np.array([1])}
    found = run(without_rounding(model), feeds)
    np.testing.assert_array_equal(found["all"][:, 1:], np.clip(new, -50, 49))
    np.testing.assert_array_equal(found["all"][:, :1], past[:, :1])
    np.testing.assert_array_equal(found["y"], found["all"])


def test_integers_that_a_step_reads_itself_stay_integers() -> None:
    text = CACHE.replace("present = Identity (q)", "z = Neg (q) present = Identity (z)")
    model = ir.from_onnx_text(text)
    assert ir.to_text(without_rounding(model)) == ir.to_text(model)


def test_a_quantisation_of_the_export_is_left_alone() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[3, 8] x, float step, uint8 middle) => (float[3, 8] y) {
            q = QuantizeLinear (x, step, middle)
            y = DequantizeLinear (q, step, middle)
        }""")
    assert ir.to_text(without_rounding(model)) == ir.to_text(model)


@pytest.mark.parametrize(
    "product",
    [
        "y = QuantBatchMatMul <dtype = 1> (q, w, scale)",
        "s = MatMul (q, w) y = AscendDequant <dtype = 1> (s, scale)",
    ],
)
def test_a_lowered_graph_keeps_what_lies_between_two_integers(product: str) -> None:
    kernel = product.startswith("y")
    model = stored(
        ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 16]>
        g (float16[3, 8] x, int8[8, 5] w, uint64[5] scale) => (float16[3, 5] y) {{
            q = AscendQuant <scale = {1 / STEP}, offset = 0.0> (x)
            {product}
        }}"""),
        w=CODES,
        scale=encoded_scale(SCALES * STEP, flag=kernel),
    )
    halves = {"x": X.astype(np.float16)}
    found = run(reference_model(without_rounding(model)), halves)["y"]
    np.testing.assert_allclose(found.astype(np.float32), EXACT, rtol=2e-3, atol=2e-3)
    rounded = run(reference_model(model), halves)["y"]
    assert np.abs(rounded - EXACT).max() > 5e-3
