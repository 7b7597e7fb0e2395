"""Sensitivities are what quantising one layer after the other shows, without doing that."""

import dataclasses

import numpy as np
import pytest

from omforge import ir
from omforge.ir.numerics import run
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.quantization import sensitivity
from omforge.quantization.blockwise import Scheme
from omforge.quantization.hqq import quantize_hqq
from omforge.quantization.linear import find_linears
from omforge.quantization.sensitivity import Sensitivity, measure_sensitivity
from omforge.recognition.feeds import token_feeds
from tests.quantization.weights import weighted

# A tied embedding, a weight that is stored turned, one that two products read, a Gemm.
TEXT = """<ir_version: 11, opset_import: ["" : 24]>
lm (int64[B, S] ids, float[40, 64] embedding, float[64] gamma, float[96, 64] gate,
    float[64, 96] up, float[96, 64] down, float[64, 64] twice, float[64, 64] mixed, float[64] bias)
    => (float[B, S, 40] logits)
{
    x = Gather (embedding, ids)
    n = RMSNormalization <axis = -1, epsilon = 0.00001> (x, gamma)
    turned = Transpose <perm = [1, 0]> (gate)
    g = MatMul (n, turned)
    u = MatMul (n, up)
    s = Swish (g)
    a = Mul (s, u)
    d = MatMul (a, down)
    once = MatMul (d, twice)
    again = MatMul (once, twice)
    r = Add (x, again)
    flat = Constant <value_ints = [-1, 64]> ()
    rows = Reshape (r, flat)
    m = Gemm <alpha = 0.5, transB = 1> (rows, mixed, bias)
    shape = Shape (r)
    back = Reshape (m, shape)
    last = Add (back, r)
    head = Transpose <perm = [1, 0]> (embedding)
    wide = MatMul (last, head)
    ten = Constant <value_float = 10.0> ()
    scale = CastLike (ten, wide)
    logits = Mul (wide, scale)
}"""
TOKENS = [np.random.default_rng(3).integers(0, 40, 50)]
SCHEMES = (Scheme(4, 32), Scheme(8, 0, symmetric=False))
NAMES = ["gate", "up", "down", "twice", "mixed", "embedding"]


def model(dtype: type = np.float32) -> ir.Model:
    text = TEXT.replace("float[", "float16[") if dtype is np.float16 else TEXT
    return weighted(ir.from_onnx_text(text), 1)


def outputs(changed: ir.Model, *names: str) -> list[np.ndarray]:
    probe = changed.clone()
    made = {v.name: v for node in probe.graph for v in node.outputs}
    probe.graph.outputs[:] = [made[name] for name in names]
    found = run(probe, token_feeds(model(), TOKENS[0][None]))
    return [found[name].astype(np.float64) for name in names]


def alone(name: str, scheme: Scheme) -> ir.Model:
    """The model with one layer quantised."""
    made = model()
    keep = tuple(other for other in NAMES if other != name)
    QuantizeWeights(scheme.bits, scheme.group, scheme.symmetric, keep=keep).run(made)
    return made


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def measure(**options: object) -> dict[str, Sensitivity]:
    made = model()
    return measure_sensitivity(made, find_linears(made), SCHEMES, TOKENS, **options)


def test_the_divergence_is_that_of_the_model_with_one_layer_quantised() -> None:
    found = measure()
    assert sorted(found) == sorted(NAMES)
    exact = log_softmax(outputs(model(), "logits")[0])
    for name in NAMES:
        other = log_softmax(outputs(alone(name, SCHEMES[0]), "logits")[0])
        divergence = (np.exp(exact) * (exact - other)).sum(-1).mean()
        assert found[name].divergence == pytest.approx(divergence, rel=1e-3), name


def test_errors_of_weights_and_outputs_are_those_of_each_scheme() -> None:
    found = measure()["down"]
    weight = model().graph.initializers["down"].const_value.numpy().astype(np.float64)
    a, exact = outputs(model(), "a", "d")
    for index, scheme in enumerate(SCHEMES):
        made = alone("down", scheme)
        (stored,) = (node for node in made.graph if node.op_type == "DequantizeLinear")
        off = outputs(made, stored.outputs[0].name)[0] - weight
        assert found.weights[index] == pytest.approx(
            np.square(off).sum() / np.square(weight).sum(), rel=1e-4
        )
        assert found.outputs[index] == pytest.approx(
            np.square(a @ off).sum() / np.square(exact).sum(), rel=1e-3
        )
    assert found.costs[0] == found.divergence
    assert found.costs[1] == pytest.approx(
        found.divergence * found.outputs[1] / found.outputs[0], rel=1e-9
    )


def test_several_walks_find_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    once = measure()
    monkeypatch.setattr(sensitivity, "_batches", lambda linears, _: [linears[:2], linears[2:]])
    twice = measure()
    for name in NAMES:
        for mine, other in zip(
            dataclasses.astuple(once[name]), dataclasses.astuple(twice[name]), strict=True
        ):
            assert mine == pytest.approx(other, rel=1e-5)


def test_many_layers_are_tried_in_batches() -> None:
    linears = find_linears(model())
    batches = list(sensitivity._batches(linears, 1 << 30))
    assert [x.name for batch in batches for x in batch] == [x.name for x in linears]
    assert len(list(sensitivity._batches(linears * 4, 1 << 30))) == 3


def test_without_a_text_the_weights_count() -> None:
    made = model()
    told: list[int] = []
    found = measure_sensitivity(made, find_linears(made), SCHEMES, report=told.append)
    assert sorted(told) == sorted(linear.nbytes for linear in find_linears(made))
    told.clear()
    with_text = measure(report=told.append)
    assert sorted(told) == sorted(linear.nbytes for linear in find_linears(made))
    for name in NAMES:
        assert found[name].divergence is None
        assert found[name].costs == found[name].weights
        assert found[name].weights == pytest.approx(with_text[name].weights, rel=1e-6)


def test_another_quantizer_and_half_precision() -> None:
    made = model(np.float16)
    found = measure_sensitivity(made, find_linears(made), SCHEMES, TOKENS, quantizer=quantize_hqq)
    nearest = measure()
    for name in NAMES:
        divergence, other = found[name].divergence, nearest[name].divergence
        assert divergence is not None
        assert other is not None
        assert divergence != other
        assert other / 3 < divergence < 3 * other


def test_the_model_is_left_as_it_is() -> None:
    made = model()
    before = ir.to_text(made)
    measure_sensitivity(made, find_linears(made), SCHEMES, TOKENS)
    assert ir.to_text(made) == before


def test_a_weight_that_is_not_finite_is_named() -> None:
    made = model()
    numbers = made.graph.initializers["up"].const_value.numpy().copy()
    numbers[3, 4] = np.inf
    made.graph.initializers["up"].const_value = ir.Tensor(numbers, name="up")
    with pytest.raises(ir.InputError, match="up cannot be quantised"):
        measure_sensitivity(made, find_linears(made), SCHEMES)
