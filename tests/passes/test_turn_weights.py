"""turn-weights: quantised weights stored [N, K], and the same numbers."""

from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.ir.numerics import run
from omforge.ir.values import dims
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.passes.turn_weights import TurnWeights
from tests.quantization.weights import weighted


def product(inputs: int, outputs: int) -> ir.Model:
    """A product with a random weight, twice."""
    return weighted(
        ir.from_onnx_text(f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float[3, {inputs}] x, float[{inputs}, {outputs}] w) => (float[3, {outputs}] y)
        {{ a = MatMul (x, w) b = Neg (x) c = MatMul (b, w) d = Mul (a, c) y = Add (d, a) }}"""),
        1,
    )


FEEDS = np.random.default_rng(0).normal(size=(3, 69)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_numbers_stay(bits: int, group: int, symmetric: bool, tmp_path: Path) -> None:
    model = product(69, 13)
    QuantizeWeights(bits, group, symmetric).run(model)  # type: ignore[arg-type]
    expected = run(model, {"x": FEEDS})["y"]
    assert TurnWeights().run(model) == 1
    ir.check(model)
    np.testing.assert_allclose(run(model, {"x": FEEDS})["y"], expected, rtol=1e-5, atol=1e-5)
    codes = next(node for node in model.graph if node.op_type == "DequantizeLinear").inputs[0]
    assert codes is not None
    assert dims(codes) == (13, 69)
    stored = [value.const_value.size for value in model.graph.initializers.values()]
    assert sum(size == 69 * 13 for size in stored) == 1, "the weight [K, N] is gone"
    ir.save(model, tmp_path / "m.onnx", external="m.bin", threshold=16)
    got = run(ir.load(tmp_path / "m.onnx"), {"x": FEEDS})["y"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [1, -1])
def test_an_export_s_own_spelling(axis: int) -> None:
    """Its axis may count from the end, and its result be of another dtype than its scales."""
    random = np.random.default_rng(0)
    model = ir.from_onnx_text(f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[3, 8] x) => (float16[3, 6] y) <float[6] s = {{1, 2, 3, 4, 5, 6}}>
        {{ w = DequantizeLinear <axis = {axis}, output_dtype = 10> (q, s) y = MatMul (x, w) }}""")
    codes = ir.tensor(random.integers(-9, 9, (8, 6)).astype(np.int8), name="q")
    dequantize = next(iter(model.graph))
    value = ir.Value(name="q", const_value=codes, type=ir.TensorType(codes.dtype))
    model.graph.register_initializer(value)
    dequantize.replace_input_with(0, value)
    feeds = {"x": random.standard_normal((3, 8)).astype(np.float16)}
    expected = run(model, feeds)["y"]
    assert TurnWeights().run(model) == 1
    ir.check(model)
    np.testing.assert_allclose(run(model, feeds)["y"], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("inputs", "outputs", "bits", "turned"),
    [(64, 100, 8, 1), (64, 40, 8, 0), (64, 12, 4, 1), (60, 12, 4, 0), (64, 12, 8, 0)],
)
def test_only_what_is_wide_or_does_not_pack_is_turned(
    inputs: int, outputs: int, bits: int, turned: int
) -> None:
    model = product(inputs, outputs)
    QuantizeWeights(bits).run(model)  # type: ignore[arg-type]
    assert TurnWeights(wider_than=64).run(model) == turned


def test_a_weight_that_others_read_stays() -> None:
    model = weighted(
        ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
        g (float[3, 8] x, float[8, 6] w) => (float[6, 3] y)
        { t = Transpose <perm = [1, 0]> (w) u = Transpose <perm = [1, 0]> (t)
          a = MatMul (x, w) y = Transpose <perm = [1, 0]> (a) }"""),
        1,
    )
    assert TurnWeights().run(model) == 0, "no weight is quantised"
