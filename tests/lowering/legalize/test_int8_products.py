"""Products of int8 by int8: the target's operators give what the canonical form gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.int8_ops import decoded_scale
from omforge.ir.numerics import run
from omforge.ir.ops import reference_model
from omforge.lowering.legality import check_legal
from omforge.lowering.legalize import Decision, legalize
from omforge.lowering.legalize.int8_products import ASCEND_DEQUANT, QUANT_MATMUL
from omforge.lowering.target import target
from omforge.passes.turn_weights import TurnWeights

A2, A310P, A310B = "Ascend910B4", "Ascend310P3", "Ascend310B1"


def product(
    inputs: int,
    outputs: int,
    step: float,
    *,
    turned: bool = False,
    gemm: bool = False,
    rows: str = "2, 3",
    seed: int = 0,
) -> ir.Model:
    """A product of x [.., K] by a random weight, as quantize-activations writes it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-128, 128, (outputs, inputs) if turned else (inputs, outputs))
    scale = (2.0 ** rng.uniform(-12, -4, outputs)).astype(np.float16)
    axis = 0 if turned else 1
    if gemm:
        rows = "6"
        body = f"y = Gemm <transB = {int(turned)}> (wide, float_weight, c)"
    elif turned:
        body = "t = Transpose <perm = [1, 0]> (float_weight) y = MatMul (wide, t)"
    else:
        body = "y = MatMul (wide, float_weight)"
    model = ir.from_onnx_text(f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[{rows}, {inputs}] x, float16 step, float16[{outputs}] s, float16[{outputs}] c,
           int8[{codes.shape[0]}, {codes.shape[1]}] w) => (float16[{rows}, {outputs}] y)
        {{
            q = QuantizeLinear <output_dtype = 3> (x, step)
            wide = DequantizeLinear (q, step)
            float_weight = DequantizeLinear <axis = {axis}> (w, s)
            {body}
        }}""")
    numbers = {
        "step": np.array(step, np.float16),
        "w": codes.astype(np.int8),
        "s": scale,
        "c": rng.normal(size=outputs).astype(np.float16),
    }
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = ir.Tensor(numbers[str(value.name)], name=value.name)
        if value.uses():
            model.graph.register_initializer(value)
    infer_model(model)
    return model


def numbers(model: ir.Model, name: str) -> np.ndarray:
    """An initializer."""
    return model.graph.initializers[name].const_value.numpy()


def lowered(model: ir.Model, soc: str = A2, form: str = QUANT_MATMUL) -> ir.Model:
    """The model in the target's dialect, which must be legal."""
    other = model.clone()
    legalize(other, target(soc), forms={"Int8MatMul": form})
    found = [offence for offence in check_legal(other, target(soc)) if offence.level == "error"]
    assert not found, "; ".join(map(str, found))
    return other


def ops(model: ir.Model) -> list[str]:
    """The operators in order, without those that move nothing."""
    return [node.op_type for node in model.graph if node.op_type != "Reshape"]


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.integers(2, 200),
    outputs=st.integers(1, 70),
    turned=st.booleans(),
    gemm=st.booleans(),
    form=st.sampled_from([QUANT_MATMUL, ASCEND_DEQUANT]),
    step=st.floats(2.0**-14, 4),
    loudness=st.sampled_from([0.1, 1, 4]),
    seed=st.integers(0, 99),
)
def test_the_lowered_form_gives_what_the_canonical_one_gives(
    inputs: int,
    outputs: int,
    turned: bool,
    gemm: bool,
    form: str,
    step: float,
    loudness: float,
    seed: int,
) -> None:
    """Odd sizes, saturated inputs, quiet ones."""
    model = product(inputs, outputs, step, turned=turned, gemm=gemm, seed=seed)
    rng = np.random.default_rng(seed)
    x = np.clip(rng.normal(size=(6, inputs)) * step * 40 * loudness, -6e4, 6e4).astype(np.float16)
    feeds = {"x": x if gemm else x.reshape(2, 3, inputs)}
    other = lowered(model, form=form)
    assert ops(other)[0] == "AscendQuant"
    assert form in ops(other)
    found = run(reference_model(other), feeds)["y"].astype(np.float64).reshape(6, outputs)

    # The canonical form in float64, for ONNX Runtime rounds float16 products along the way.
    stored = numbers(model, "step").astype(np.float64)
    quotient = x.astype(np.float64) / stored
    codes = np.clip(np.rint(quotient), -128, 127)
    weight = numbers(model, "w").astype(np.float64)
    weight = (weight.T if turned else weight) * numbers(model, "s").astype(np.float64)
    expected = codes @ weight * stored
    # One code more or less where x/step is nearly half-way between two.
    doubtful = np.abs(np.abs(quotient - np.rint(quotient)) - 0.5) <= 127 * 2.0**-10
    doubtful &= np.abs(quotient) < 129
    slack = doubtful @ np.abs(weight) * stored
    if gemm:
        expected = expected + numbers(model, "c").astype(np.float64)
    kept = np.abs(expected) < 6e4
    # Scales of ten bits, a float16 reciprocal, and the rounding of the result (twice for a Gemm).
    close = np.abs(found - expected) <= slack + 4 * 2.0**-11 * (np.abs(codes @ weight * stored) + 4)
    assert close[kept].all()
    assert np.abs(found[~kept]).min(initial=np.inf) > 5e4


@pytest.mark.parametrize(
    ("soc", "expected"),
    [
        (A2, ["AscendQuant", QUANT_MATMUL]),
        (A310P, ["AscendQuant", QUANT_MATMUL]),
        ("Ascend910_9391", ["AscendQuant", QUANT_MATMUL]),
        ("Ascend910_95", ["AscendQuant", QUANT_MATMUL]),
        (A310B, ["AscendQuant", "MatMul", ASCEND_DEQUANT]),
    ],
)
def test_each_soc_gets_what_it_has(soc: str, expected: list[str]) -> None:
    model = product(64, 32, 0.25, turned=soc == A310P)
    other = model.clone()
    legalize(other, target(soc))
    assert not [o for o in check_legal(other, target(soc)) if o.level == "error"]
    assert ops(other) == expected


def test_scales_and_weights_are_given_as_the_kernels_read_them() -> None:
    model = product(64, 32, 0.25)
    one, two = lowered(model), lowered(model, form=ASCEND_DEQUANT)
    quant = next(node for node in one.graph if node.op_type == "AscendQuant")
    assert {name: a.value for name, a in quant.attributes.items()} == {
        "scale": 4.0,
        "offset": 0.0,
        "dst_type": "INT8",
    }
    expected = numbers(model, "s").astype(np.float32) * np.float32(0.25)
    for other, op, index in ((one, QUANT_MATMUL, 2), (two, ASCEND_DEQUANT, 1)):
        node = next(node for node in other.graph if node.op_type == op)
        scale = node.inputs[index].const_value.numpy()
        assert scale.dtype == np.uint64
        assert scale.shape == (32,)
        assert ((scale >> np.uint64(32)) == (1 << 14 if op == QUANT_MATMUL else 0)).all()
        np.testing.assert_allclose(decoded_scale(scale), expected, rtol=2.0**-11)
        assert node.attributes["dtype"].value == 1
    weights = [node.inputs[1] for node in (*one.graph, *two.graph) if "MatMul" in node.op_type]
    assert [value.name for value in weights] == ["w", "w"], "the integers are the canonical ones"


def test_310p_turns_its_weights() -> None:
    model = product(64, 32, 0.25)
    other = model.clone()
    told: list[Decision] = []
    legalize(other, target(A310P), told=told)
    refused = {r.form: r.reason for d in told if d.op == "Int8MatMul" for r in d.refused}
    assert refused[QUANT_MATMUL] == "310P takes a weight stored [N, K]: turn-weights"
    TurnWeights().run(model)
    node = next(node for node in lowered(model, A310P).graph if node.op_type == QUANT_MATMUL)
    assert node.attributes["transpose_x2"].value == 1
    assert node.inputs[1].const_value.shape == (32, 64)


def test_products_of_one_value_share_its_integers() -> None:
    model = product(64, 32, 0.25)
    first = next(node for node in model.graph if node.op_type == "MatMul")
    again = ir.node("MatMul", list(first.inputs), name="again")
    again.outputs[0].name = "z"
    model.graph.append(again)
    model.graph.outputs.append(again.outputs[0])
    infer_model(model)
    found = ops(lowered(model))
    assert found.count("AscendQuant") == 1
    assert found.count(QUANT_MATMUL) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": 131072, "outputs": 1}, "it has 131072 inputs: from 131072 on a sum may leave"),
        ({"step": 2.0**-20}, "the reciprocal of the step 9.53674e-07 is beyond float16"),
    ],
)
def test_what_no_kernel_takes_is_refused_in_words(change: dict, message: str) -> None:
    settings = {"inputs": 8, "outputs": 4, "step": 0.25, **change}
    model = product(settings["inputs"], settings["outputs"], settings["step"])
    told: list[Decision] = []
    legalize(model, target(A310B), told=told)
    assert any(message in decision.reason for decision in told)


def test_one_step_for_a_cache_is_no_matter_of_products() -> None:
    """A QuantizeLinear whose integers leave the graph stays arithmetic."""
    model = ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[2,3] x, float16 step) => (int8[2,3] y)
        { y = QuantizeLinear <output_dtype = 3> (x, step) }""")
    step = model.graph.inputs.pop()
    step.const_value = ir.Tensor(np.array(0.25, np.float16), name="step")
    model.graph.register_initializer(step)
    infer_model(model)
    legalize(model, target(A310P))
    assert "AscendQuant" not in ops(model)
    assert ops(model)[-1] == "Cast"
