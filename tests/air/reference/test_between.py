"""The twin of a GE graph without the rounding to int8."""

import numpy as np
import onnx
import pytest

from omforge import ir
from omforge.air.graph import Air
from omforge.air.reference import Reference, reference
from omforge.ir.infer import infer_model
from omforge.ir.int8_ops import encoded_scale
from omforge.lowering.emit import emit
from omforge.runtime.session import OrtSession
from tests.runtime.test_unrounded import CODES, EXACT, SCALES, STEP, X, stored

OPSETS = '<ir_version: 10, opset_import: ["" : 16, "ge" : 1]>'


def air(text: str, **constants: np.ndarray) -> Air:
    """A lowered graph in ONNX's text as a GE graph."""
    model = stored(ir.from_onnx_text(f"{OPSETS} {text}"), **constants)
    infer_model(model)
    for node in model.graph:
        node.name = node.outputs[0].name
        if node.op_type == "Scatter":  # what it writes is like what it is given
            node.outputs[0].type, node.outputs[0].shape = node.inputs[0].type, node.inputs[0].shape
    return emit(model, "g", lambda tensor: None).air


def run(twin: Reference, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    onnx.checker.check_model(twin.model)
    return OrtSession(twin.model.SerializeToString()).run(feeds)


@pytest.mark.parametrize(
    "product",
    [
        "y = QuantBatchMatMul <dtype = 1> (q, w, scale)",
        "s = MatMul (q, w) y = AscendDequant <dtype = 1> (s, scale)",
    ],
)
def test_products_of_what_lies_between_two_integers(product: str) -> None:
    kernel = product.startswith("y")
    graph = air(
        f"""g (float16[3, 8] x, int8[8, 5] w, uint64[5] scale) => (float16[3, 5] y) {{
            q = AscendQuant <scale = {1 / STEP}, offset = 0.0> (x)
            {product}
        }}""",
        w=CODES,
        scale=encoded_scale(SCALES * STEP, flag=kernel),
    )
    halves = {"x": X.astype(np.float16)}
    found = run(reference(graph, ["y"], rounding=False), halves)["y"]
    np.testing.assert_allclose(found.astype(np.float32), EXACT, rtol=2e-3, atol=2e-3)
    rounded = run(reference(graph, ["y"]), halves)["y"]
    assert np.abs(rounded - EXACT).max() > 5e-3
    steps = np.clip(np.round(halves["x"].astype(np.float32) / STEP), -128, 127) * STEP
    np.testing.assert_allclose(rounded, steps @ (CODES * SCALES), rtol=2e-3, atol=2e-3)


CACHE = """g (float16[1, 1, 2, 4] new, int8[1, 1, 5, 4] past, int64[1] at, float16 low, float16 high)
    => (float16[1, 1, 5, 4] y, int8[1, 1, 2, 4] other) {
    c = Clip (new, low, high)
    r = Round (c)
    q = Cast <to = 3> (r)
    moved = Identity (q)
    whole = ge.Scatter <slots = ["var", "indices", "updates"], reduce = "update", axis = -2>
        (past, at, moved)
    y = Cast <to = 10> (whole)
    a = Abs (r)
    other = Cast <to = 3> (a)
}"""
NEW = np.array([0.5, -3.25, 48.75, -49.5, 80, -90, 0, 1], np.float16).reshape(1, 1, 2, 4)
BOUNDS = {"low": np.array(-50, np.float16), "high": np.array(49, np.float16)}


def test_a_cache_in_place_holds_what_lies_between_two_integers() -> None:
    past = np.random.default_rng(0).normal(size=(1, 1, 5, 4)).astype(np.float32)
    feeds = {"new": NEW, "past": past, "at": np.array([2])}
    found = run(reference(air(CACHE, **BOUNDS), ["y", "other"], rounding=False), feeds)
    expected = past.copy()
    expected[:, :, 2:4] = np.clip(NEW, -50, 49)
    np.testing.assert_array_equal(found["past.written"], expected)
    np.testing.assert_array_equal(found["y"], expected.astype(np.float16))
    # What is int8 for another reason stays so.
    kept = np.abs(np.round(np.clip(NEW, -50, 49))).astype(np.int8)
    np.testing.assert_array_equal(found["other"], kept)
    assert found["other"].dtype == np.int8
    feeds["past"] = past.astype(np.int8)
    rounded = run(reference(air(CACHE, **BOUNDS), ["y", "other"]), feeds)["past.written"]
    assert rounded.dtype == np.int8
    np.testing.assert_array_equal(rounded[:, :, 2:4], np.round(np.clip(NEW, -50, 49)))


def test_another_way_of_rounding_into_the_cache_is_refused() -> None:
    text = CACHE.replace("moved = Identity (q)", "n = Neg (r) moved = Cast <to = 3> (n)")
    both = text.replace("(float16[1, 1, 5, 4] y,", "(float16[1, 1, 5, 4] y, int8[1, 1, 2, 4] q,")
    reference(air(both, **BOUNDS))
    with pytest.raises(ir.InputError, match="rounded in a way that cannot be left out"):
        reference(air(both, **BOUNDS), rounding=False)
