"""Quantising by a text: what later layers see, and what becomes of the norms."""

from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.ir.numerics import run
from omforge.passes.quantize_weights import QuantizeWeights
from tests.quantization.weights import weighted

# An embedding, a norm that two layers read, and a tied head.
TEXT = """<ir_version: 11, opset_import: ["" : 24]>
lm (int64[B, S] ids, float[40, 64] embedding, float[64] gamma, float[64, 64] gate,
    float[64, 64] up, float[64, 64] down) => (float[B, S, 40] logits)
{
    x = Gather (embedding, ids)
    n = RMSNormalization <axis = -1, epsilon = 0.00001> (x, gamma)
    g = MatMul (n, gate)
    u = MatMul (n, up)
    s = Swish (g)
    a = Mul (s, u)
    d = MatMul (a, down)
    r = Add (x, d)
    head = Transpose <perm = [1, 0]> (embedding)
    logits = MatMul (r, head)
}"""
TOKENS = [np.random.default_rng(i).integers(0, 40, 200) for i in range(4)]
HELD_OUT = {"ids": np.random.default_rng(9).integers(0, 40, (1, 100))}


def model() -> ir.Model:
    made = weighted(ir.from_onnx_text(TEXT), 1)
    # Some inputs of the layers are much stronger than others.
    gamma = np.where(np.arange(64) % 16 == 1, 12, 1).astype(np.float32)
    made.graph.initializers["gamma"].const_value = ir.Tensor(gamma, name="gamma")
    return made


def error(**options: object) -> float:
    quantized = model()
    QuantizeWeights(4, 64, tokens=TOKENS, **options).run(quantized)
    ir.check(quantized)
    expected = run(model(), HELD_OUT)["logits"]
    return float(np.linalg.norm(run(quantized, HELD_OUT)["logits"] - expected))


@pytest.mark.parametrize("symmetric", [True, False])
def test_both_methods_are_better_than_the_nearest_integers(symmetric: bool) -> None:
    nearest = error(symmetric=symmetric)
    assert error(method="gptq", symmetric=symmetric) < nearest
    assert error(method="awq", symmetric=symmetric) < nearest


def test_awq_puts_the_scales_into_the_norm() -> None:
    quantized = model()
    before = [node.op_type for node in quantized.graph]
    QuantizeWeights(4, 64, method="awq", tokens=TOKENS).run(quantized)
    after = [node.op_type for node in quantized.graph if node.op_type == "RMSNormalization"]
    assert after == ["RMSNormalization"] == [t for t in before if t == "RMSNormalization"]
    norm = next(node for node in quantized.graph if node.op_type == "RMSNormalization")
    gamma = norm.inputs[1].const_value.numpy()
    assert gamma.shape == (64,)
    assert not np.array_equal(gamma, model().graph.initializers["gamma"].const_value.numpy())


def test_a_file_of_tokens(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array(TOKENS))
    from_file, given = model(), model()
    QuantizeWeights(4, 64, method="gptq", calibration=str(tmp_path / "t.npy")).run(from_file)
    QuantizeWeights(4, 64, method="gptq", tokens=TOKENS).run(given)
    for name, value in given.graph.initializers.items():
        same = from_file.graph.initializers[name].const_value
        assert same.tobytes() == value.const_value.tobytes(), name


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_without_a_text_is_an_error(method: str) -> None:
    with pytest.raises(ir.InputError, match=f"{method} needs a calibration text"):
        QuantizeWeights(4, 64, method=method).run(model())


@pytest.mark.parametrize(
    ("content", "why"), [(b"no numpy", "cannot read"), (None, r"float64\[2\]")]
)
def test_a_wrong_file_is_an_error(tmp_path: Path, content: bytes | None, why: str) -> None:
    file = tmp_path / "t.npy"
    if content is None:
        np.save(file, np.array([0.5, 1]))
    else:
        file.write_bytes(content)
    with pytest.raises(ir.InputError, match=why):
        QuantizeWeights(4, 64, method="gptq", calibration=str(file)).run(model())
