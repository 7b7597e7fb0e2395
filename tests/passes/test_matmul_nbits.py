"""matmul-nbits: products with the integers themselves, and the same numbers."""

from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.ir.numerics import run
from omforge.passes.matmul_nbits import MatmulNbits
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.passes.raise_contrib_ops import RaiseContribOps
from omforge.passes.turn_weights import TurnWeights
from omforge.rewriting.events import events
from tests.quantization.weights import weighted


def product(inputs: int, outputs: int, op: str = "MatMul (x, w)") -> ir.Model:
    return weighted(
        ir.from_onnx_text(f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float[3, {inputs}] x, float[{inputs}, {outputs}] w, float[{outputs}] c)
          => (float[3, {outputs}] y)
        {{ z = {op} y = Add (z, c) }}"""),
        1,
    )


def feeds(inputs: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=(3, inputs)).astype(np.float32)}


@pytest.mark.parametrize("op", ["MatMul (x, w)", "Gemm (x, w, c)"])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "inputs"), [(4, 32, 96), (4, 64, 192), (8, 0, 48), (8, 32, 96)]
)
def test_the_numbers_stay(
    bits: int, group: int, inputs: int, symmetric: bool, unsigned: bool, op: str, tmp_path: Path
) -> None:
    """Of odd numbers of groups, too, whose zero points do not fill a byte; also from a file."""
    model = product(inputs, 24, op)
    QuantizeWeights(bits, group, symmetric, unsigned=unsigned).run(model)  # type: ignore[arg-type]
    TurnWeights().run(model)
    expected = run(model, feeds(inputs))["y"]
    assert MatmulNbits().run(model) == 1
    ir.check(model)
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & {node.op_type for node in model.graph}
    np.testing.assert_allclose(run(model, feeds(inputs))["y"], expected, rtol=1e-5, atol=1e-5)
    ir.save(model, tmp_path / "m.onnx", external="m.bin", threshold=16)
    loaded = ir.load(tmp_path / "m.onnx")
    np.testing.assert_allclose(run(loaded, feeds(inputs))["y"], expected, rtol=1e-5, atol=1e-5)
    assert RaiseContribOps().run(loaded) == 1, "the pass for exports takes it back"
    np.testing.assert_allclose(run(loaded, feeds(inputs))["y"], expected, rtol=1e-5, atol=1e-5)


def test_unsigned_codes_are_the_same_memory() -> None:
    model = product(96, 24)
    QuantizeWeights(4, 32, unsigned=True).run(model)
    TurnWeights().run(model)
    codes = next(n for n in model.graph if n.op_type == "DequantizeLinear").inputs[0]
    assert codes is not None
    assert codes.const_value is not None
    held = codes.const_value.tobytes()
    MatmulNbits().run(model)
    node = next(n for n in model.graph if n.op_type == "MatMulNBits")
    assert [value is None for value in node.inputs] == [False] * 3, "half the range goes unsaid"
    tensor = node.inputs[1].const_value  # type: ignore[union-attr]
    assert tensor is not None
    assert (tensor.tobytes(), tuple(tensor.shape)) == (held, (24, 3, 16))


@pytest.mark.parametrize(
    ("inputs", "group", "reason"),
    [
        (100, 32, "groups of 32 for 100 inputs"),
        (192, 96, "groups of 96"),
        (24, 0, "no size for 24"),
    ],
)
def test_what_the_operator_does_not_take_stays(inputs: int, group: int, reason: str) -> None:
    model = product(inputs, 8)
    QuantizeWeights(8, group).run(model)
    TurnWeights().run(model)
    assert MatmulNbits().run(model) == 0
    (event,) = [e for e in events(model) if e.pass_name == MatmulNbits.name]
    assert reason in event.reason


def test_a_weight_that_is_not_turned_stays() -> None:
    model = product(96, 24)
    QuantizeWeights(8, 32).run(model)
    assert MatmulNbits().run(model) == 0
    (event,) = [e for e in events(model) if e.pass_name == MatmulNbits.name]
    assert "turn-weights" in event.reason
