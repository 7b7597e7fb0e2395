"""int8 for what layers read: where divisions go, and which layers read floats."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.quantization.activations import Int8Layers, choose_int8
from omforge.quantization.linear import find_linears
from tests.quantization.weights import weighted

# An embedding, a norm that two layers read, a Mul in front of a third, and a tied head.
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
TOKENS = [np.random.default_rng(i).integers(0, 40, 100) for i in range(3)]


def model(text: str = TEXT) -> ir.Model:
    """Some channels of the norm and of `up` are much louder than others."""
    made = weighted(ir.from_onnx_text(text), 1)
    for name, loud in (("gamma", 20), ("up", 30)):
        value = made.graph.initializers.get(name)
        if value is not None:
            numbers = value.const_value.numpy() * np.where(np.arange(64) % 16 == 1, loud, 1)
            value.const_value = ir.Tensor(numbers.astype(np.float32), name=name)
    infer_model(made)
    return made


def chosen(made: ir.Model, **options: object) -> Int8Layers:
    settings = {"smooth": True, "limit": 1.0, **options}
    return choose_int8(made, find_linears(made), TOKENS, **settings)


def test_a_norm_and_a_layer_before_a_mul_take_divisions() -> None:
    made = model()
    found = chosen(made)
    assert [value.name for value in found.norms] == ["n"]
    assert set(found.factors) == {"gate", "up", "down"}
    assert found.factors["gate"] is found.factors["up"]
    assert set(found.steps) == {"gate", "up", "down", "embedding"}
    assert found.steps["gate"] == found.steps["up"]
    # The layer before the Mul has the scales that give u / s.
    up = found.weights["up"]
    numbers = up.codes.numpy() * up.scale.numpy()
    weight = made.graph.initializers["up"].const_value.numpy()
    expected = weight * found.factors["up"][:, None] / found.factors["down"]
    np.testing.assert_allclose(numbers, expected, atol=np.abs(expected).max(0).max() / 120)


def test_smoothing_makes_the_errors_smaller() -> None:
    smooth, plain = chosen(model()), chosen(model(), smooth=False)
    assert not plain.norms
    assert not plain.factors
    for name in ("gate", "up", "down"):
        assert smooth.errors[name] < plain.errors[name]
    assert smooth.errors["down"] < plain.errors["down"] / 2


def test_layers_above_the_limit_read_floats() -> None:
    found = chosen(model(), limit=0.0)
    assert not found.steps
    assert set(found.weights) == {"gate", "up", "down", "embedding"}
    for name, error in found.errors.items():
        assert found.floats[name] == f"its outputs would be off by {error:.1%}, the limit is 0.0%"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a = Mul (s, u)", "a = Add (s, u)"),
        ("a = Mul (s, u)", "a = Mul (s, u) other = Relu (a)"),
        ("a = Mul (s, u)", "v = Relu (u) a = Mul (s, v)"),
        ("r = Add (x, d)", "e = Add (x, d) r = Add (e, u)"),
    ],
    ids=["add", "another reader", "not linear", "another use of the layer"],
)
def test_other_values_are_not_divided(old: str, new: str) -> None:
    text = TEXT.replace(old, new)
    text = (
        text.replace("logits)\n", "logits, float[B, S, 64] other)\n", 1) if "other" in new else text
    )
    found = chosen(model(text))
    assert "down" not in found.factors
    assert "down" in found.steps


def test_a_weight_that_several_products_read_has_inputs_in_floats() -> None:
    found = chosen(
        model(TEXT.replace("MatMul (n, up)", "MatMul (n, gate)").replace("float[64, 64] up, ", ""))
    )
    assert found.floats == {"gate": "2 products share its weight, each with inputs of its own"}
    assert "gate" in found.weights


def test_later_layers_see_the_integers_of_earlier_ones() -> None:
    made = model()
    coarse = chosen(made)
    first = chosen(model(), smooth=False)
    assert coarse.steps["embedding"] != first.steps["embedding"]


def test_no_text_and_a_text_of_infinities_are_errors() -> None:
    made = model()
    with pytest.raises(ir.InputError, match="int8 activations need a calibration text"):
        choose_int8(made, find_linears(made), [], smooth=True, limit=1.0)
    numbers = made.graph.initializers["gamma"].const_value.numpy().copy()
    numbers[0] = np.inf
    made.graph.initializers["gamma"].const_value = ir.Tensor(numbers, name="gamma")
    with pytest.raises(ir.InputError, match="the calibration text makes n infinite"):
        chosen(made)
