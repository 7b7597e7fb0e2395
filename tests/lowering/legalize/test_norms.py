"""RMSNormalization to NPURmsNorm, and LayerNormalization to the operators of opset 16."""

from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from omforge import ir
from omforge.lowering.legality import check_legal
from omforge.lowering.legalize import legalize
from omforge.lowering.target import target
from tests.lowering.legalize.conftest import parse

NUMPY = {"float": np.float32, "float16": np.float16}


def rms(dtype: str, epsilon: str, *, axis: int = -1, gamma: str = "8") -> str:
    return f"""
        norm ({dtype}[2,3,8] x, {dtype}[{gamma}] gamma) => ({dtype}[2,3,8] y)
        {{ y = RMSNormalization <axis = {axis}, epsilon = {epsilon}> (x, gamma) }}
    """


def feeds(dtype: str, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "x": (rng.standard_normal((2, 3, 8)) * scale).astype(NUMPY[dtype]),
        "gamma": rng.standard_normal(8).astype(NUMPY[dtype]),
    }


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("scale", [1.0, 3e-3])
def test_an_epsilon_of_1e_6_is_the_op_as_it_is(lower: Any, dtype: str, scale: float) -> None:
    lowered = lower(rms(dtype, "1e-6"), feeds(dtype, scale))
    assert lowered.ops == ["NPURmsNorm"]
    (node,) = list(lowered.model.graph)
    assert len(node.outputs) == 2
    assert all(value.name for value in node.outputs)


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("epsilon", ["1e-5", "1e-3"])
@pytest.mark.parametrize("scale", [1.0, 3e-3])
def test_a_larger_epsilon_scales_the_input(
    lower: Any, dtype: str, epsilon: str, scale: float
) -> None:
    """At 3e-3 the mean square is 1e-5: without the scaling y would be off by 40 %."""
    lowered = lower(rms(dtype, epsilon), feeds(dtype, scale))
    assert lowered.ops == ["Mul", "NPURmsNorm"]


def test_a_smaller_epsilon_in_fp16_goes_through_fp32(lower: Any) -> None:
    """The scale sqrt(1e-6 / 1e-12) is 1000: 1000 * 100 would overflow fp16."""
    lowered = lower(rms("float16", "1e-12"), feeds("float16", 100))
    assert lowered.ops == ["Cast", "Mul", "Cast", "NPURmsNorm", "Cast"]
    assert np.isfinite(lowered.found[0].astype(np.float32)).all()


def test_large_fp16_inputs_do_not_overflow(lower: Any) -> None:
    lowered = lower(rms("float16", "1e-5"), feeds("float16", 1e4))
    assert np.isfinite(lowered.found[0].astype(np.float32)).all()


def test_a_norm_over_two_axes_is_decomposed(lower: Any) -> None:
    given = feeds("float")
    given["gamma"] = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    lowered = lower(rms("float", "1e-5", axis=1, gamma="3,8"), given)
    assert "NPURmsNorm" not in lowered.ops


def test_an_epsilon_of_zero_is_decomposed(lower: Any) -> None:
    assert "NPURmsNorm" not in lower(rms("float", "0.0"), feeds("float")).ops


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("bias", ["", ", bias"])
@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_normalization(lower: Any, dtype: str, bias: str, axis: int) -> None:
    shape = (8,) if axis == -1 else (3, 8)
    dims = ",".join(map(str, shape))
    declared = f", {dtype}[{dims}] bias" if bias else ""
    text = f"""
        norm ({dtype}[2,3,8] x, {dtype}[{dims}] gamma {declared}) => ({dtype}[2,3,8] y)
        {{ y = LayerNormalization <axis = {axis}, epsilon = 1e-5> (x, gamma {bias}) }}
    """
    rng = np.random.default_rng(4)
    lowered = lower(
        text,
        {
            "x": (5 + 3 * rng.standard_normal((2, 3, 8))).astype(NUMPY[dtype]),
            "gamma": rng.standard_normal(shape).astype(NUMPY[dtype]),
            "bias": rng.standard_normal(shape).astype(NUMPY[dtype]),
        },
    )
    assert "LayerNormalization" not in lowered.ops


def test_layer_normalization_returns_mean_and_deviation_where_they_are_read(lower: Any) -> None:
    text = """
        norm (float[2,8] x, float[8] gamma) => (float[2,8] y, float[2,1] mean, float[2,1] inverse)
        { y, mean, inverse = LayerNormalization (x, gamma) }
    """
    x = np.random.default_rng(5).standard_normal((2, 8)).astype(np.float32)
    lower(text, {"x": x, "gamma": np.ones(8, np.float32)})


@pytest.mark.parametrize("weights", ["given", "stored"])
@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_a_decomposed_norm_rounds_once(op: str, weights: str) -> None:
    """Scale and bias are applied ahead of the one rounding, not rounded behind one each."""
    rng = np.random.default_rng(7)
    arrays = {"x": 3 + rng.standard_normal((16, 32)), "gamma": 1 + rng.standard_normal(32) / 9}
    if op == "LayerNormalization":
        arrays["beta"] = rng.standard_normal(32)
    given = {name: array.astype(np.float16) for name, array in arrays.items()}
    names = ", ".join(name for name in given if name != "x")
    shapes = ", ".join(f"float16[32] {name}" for name in given if name != "x")
    model = parse(f"""norm (float16[16,32] x, {shapes}) => (float16[16,32] y)
        {{ y = {op} <epsilon = 1e-5> (x, {names}) }}""")
    if weights == "stored":
        for value in list(model.graph.inputs)[1:]:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(given[str(value.name)], name=value.name)
            model.graph.register_initializer(value)
    legalize(model, target("Ascend310B1"))
    ops = [node.op_type for node in model.graph]
    assert ops.count("Cast") == (2 if weights == "stored" else 1 + len(given))
    # ONNX Runtime leaves out roundings between two of its operators; the reference does not.
    fed = {name: given[name] for name in (str(value.name) for value in model.graph.inputs)}
    (y,) = ReferenceEvaluator(ir.to_proto(model)).run(None, fed)
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    x = wide["x"] - (wide["x"].mean(-1, keepdims=True) if "beta" in wide else 0)
    exact = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * wide["gamma"]
    exact += wide.get("beta", 0)
    assert (np.abs(y - exact) <= 0.51 * np.spacing(np.abs(y)).astype(float)).all()


ADD_NORM = """
    norm ({dtype}[2,3,8] a, {dtype}[2,3,8] b, {dtype}[8] gamma)
        => ({dtype}[2,3,8] y, {dtype}[2,3,8] next)
    {{
        x = Add (a, b)
        y = RMSNormalization <epsilon = {epsilon}> (x, gamma)
        next = Add (x, y)
    }}
"""
ADDED = {"RMSNormalization": "NPUAddRmsNorm"}


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B4"])
def test_a_sum_and_its_norm_are_one_kernel_where_that_is_asked_for(
    lower: Any, soc: str, dtype: str
) -> None:
    x = feeds(dtype)
    given = {"a": x["x"], "b": x["x"][::-1].copy(), "gamma": x["gamma"]}
    text = ADD_NORM.format(dtype=dtype, epsilon="1e-6")
    assert lower(text, given, soc=soc, forms=ADDED).ops == ["NPUAddRmsNorm", "Add"]
    assert lower(text, given, soc=soc).ops == ["Add", "NPURmsNorm", "Add"]


def test_another_epsilon_keeps_the_sum_apart(lower: Any) -> None:
    x = feeds("float")
    given = {"a": x["x"], "b": x["x"], "gamma": x["gamma"]}
    lowered = lower(ADD_NORM.format(dtype="float", epsilon="1e-5"), given, forms=ADDED)
    assert lowered.ops == ["Add", "Mul", "NPURmsNorm", "Add"]


def test_a_sum_that_is_read_ahead_of_its_norm_stays(lower: Any) -> None:
    text = """
        norm (float[2,3,8] a, float[2,3,8] b, float[8] gamma) => (float[2,3,8] y, float[2,3,8] z)
        { x = Add (a, b)  z = Neg (x)  y = RMSNormalization <epsilon = 1e-6> (x, gamma) }
    """
    x = feeds("float")
    given = {"a": x["x"], "b": x["x"], "gamma": x["gamma"]}
    assert "NPURmsNorm" in lower(text, given, forms=ADDED).ops


def test_a_soc_without_the_kernel_gets_standard_operators(lower: Any) -> None:
    lowered = lower(rms("float16", "1e-5"), feeds("float16"), soc="Ascend310B1")
    assert {"ReduceMean", "Sqrt", "Div"} <= set(lowered.ops)


@pytest.mark.parametrize(("epsilon", "ops"), [("1e-6", 1), ("1e-5", 2)])
def test_bfloat16_stays_bfloat16_where_the_soc_has_it(
    text_to_model: Any, epsilon: str, ops: int
) -> None:
    """ONNX Runtime has no CPU kernels for it: what is checked is the dtype and the legality."""
    model = text_to_model(rms("bfloat16", epsilon))
    legalize(model, target("Ascend910B4"))
    assert len(model.graph) == ops
    assert check_legal(model, target("Ascend910B4")) == []
    assert model.graph.outputs[0].dtype == ir.DataType.BFLOAT16
