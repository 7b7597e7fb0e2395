"""A model run a few nodes at a time gives what it gives at once."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.numerics import run
from omforge.ir.segment import Walk
from tests.passes.quantization.weights import weighted

TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[B, 4] x, float[4, 4] a, float[4, 4] b) => (float[B, 4] y) {
    h = MatMul (x, a)
    left, right = Split <axis = 1, num_outputs = 2> (h)
    turned = Concat <axis = 1> (right, left)
    m = MatMul (turned, b)
    y = Add (m, h)
}"""
X = [np.random.default_rng(i).normal(size=(i + 1, 4)).astype(np.float32) for i in range(2)]


def model() -> ir.Model:
    return weighted(ir.from_onnx_text(TEXT), 1)


def values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(v.name): v for node in model.graph for v in node.outputs}


def test_every_stop_gives_what_the_whole_gives() -> None:
    whole = model()
    named = values(whole)
    walk = Walk(whole, [{"x": x} for x in X])
    probe = model()
    probe.graph.outputs[:] = [values(probe)[name] for name in ("h", "turned", "y")]
    expected = [run(probe, {"x": x}) for x in X]
    for name in ("h", "turned", "y"):
        for found, right in zip(walk.advance(named[name]), expected, strict=True):
            np.testing.assert_allclose(found, right[name], rtol=1e-5)


def test_weights_may_be_replaced_on_the_way() -> None:
    whole = model()
    named = values(whole)
    walk = Walk(whole, [{"x": X[1]}])
    (h,) = walk.advance(named["h"])
    zeros = np.zeros((4, 4), np.float32)
    (y,) = walk.advance(named["y"], {whole.graph.initializers["b"]: zeros})
    np.testing.assert_array_equal(y, h)


def test_what_nobody_reads_any_more_is_dropped() -> None:
    whole = model()
    named = values(whole)
    walk = Walk(whole, [{"x": X[0]}])
    walk.advance(named["turned"])
    assert set(walk._envs[0]) == {"h", "turned"}
    walk.advance(named["m"])
    assert set(walk._envs[0]) == {"h", "m"}


def test_control_flow_is_refused() -> None:
    text = """<ir_version: 11, opset_import: ["" : 24]>
    g (bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) { a = Identity (x) },
                    else_branch = e () => (float[2] b) { b = Neg (x) }>
    }"""
    with pytest.raises(ir.InputError, match="holds a subgraph"):
        Walk(ir.from_onnx_text(text), [{}])
