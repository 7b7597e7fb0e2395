"""What each layer lost: weights by hand, outputs by running both graphs."""

from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.ir.int8_ops import INPUTS_MULTIPLIED, OUTPUTS_DIVIDED
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.runtime.quality_layers import (
    block_outputs,
    compare_layers,
    dequantized_rows,
    output_errors,
    weight_error,
)

HEADER = '<ir_version: 11, opset_import: ["" : 24]>'
FLOAT = f"""{HEADER} g (float[S, 4] x) => (float[S, 2] y)
    <float[4, 2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}> {{ y = MatMul (x, w) }}"""


def quantized(attributes: str, integers: str, kind: str = "int8", ahead: str = "") -> ir.Model:
    return ir.from_onnx_text(
        f"""{HEADER} g (float[S, 4] x) => (float[S, 2] y) <{integers}>
        {{
            d = DequantizeLinear <{attributes}> (q, s{", z" if "z = " in integers else ""})
            {ahead or "w = Identity (d)"}
            y = MatMul (x, {"w" if ahead else "d"})
        }}"""
    )


def product(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "MatMul")


CASES = {
    "per channel": ("axis = 1", "int8[4, 2] q = {1, 2, 3, 4, 5, 6, 7, 4}, float[2] s = {1, 1}", ""),
    "groups along K": (
        "axis = 0, block_size = 2",
        "int8[4, 2] q = {1, 1, 3, 2, 5, 3, 7, 2}, float[2, 2] s = {1, 2, 1, 2}",
        "",
    ),
    "with zero points": (
        "axis = 0, block_size = 2",
        "int8[4, 2] q = {2, 3, 4, 5, 5, 6, 7, 4}, float[2, 2] s = {1, 1, 1, 1}, int8[2, 2] z = {1, 1, 0, 0}",
        "",
    ),
    "turned": (
        "axis = 1, block_size = 2",
        "int8[2, 4] q = {1, 3, 5, 7, 2, 4, 6, 4}, float[2, 2] s = {1, 1, 1, 1}",
        "w = Transpose <perm = [1, 0]> (d)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_of_weights_by_hand(case: str) -> None:
    attributes, integers, ahead = CASES[case]
    # All are exact but the last weight, which is 4 instead of 8: 4 / sqrt(1 + 4 + .. + 64).
    other = quantized(attributes, integers, ahead=ahead)
    error = weight_error(product(ir.from_onnx_text(FLOAT)), product(other))
    assert error == pytest.approx(4 / np.sqrt(204))


def test_integers_of_4_bits_in_a_file(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (6, 10))
    scale = np.arange(1, 21, dtype=np.float32).reshape(2, 10)
    model = quantized(
        "axis = 0, block_size = 3", "int8[4, 2] q = {0, 0, 0, 0, 0, 0, 0, 0}, float[2] s = {1, 1}"
    )
    initializers = model.graph.initializers
    packed = (codes.reshape(-1, 2) & 15) @ [1, 16]
    initializers["q"].const_value = ir.PackedTensor(
        packed.astype(np.uint8), ir.DataType.INT4, shape=ir.Shape([6, 10]), name="q"
    )
    initializers["s"].const_value = ir.Tensor(scale, name="s")
    ir.save(model, tmp_path / "m.onnx", external="m.bin", threshold=0)
    node = next(iter(ir.load(tmp_path / "m.onnx").graph))
    parts = list(dequantized_rows(node))
    np.testing.assert_array_equal(
        np.concatenate([rows for _, _, rows in parts]), codes * scale.repeat(3, 0)
    )


BLOCK = f"""{HEADER} lm (float[1, S, 4] x) => (float[1, S, 2] logits)
    <float[4] gamma = {{1, GAMMA, 1, 1}}, float[4, 4] wq = {{Q}}, float[4, 2] head = {{1, 2, 3, 4, 5, 6, 7, 8}}>
    {{
        n = RMSNormalization <axis = -1> (x, gamma)
        q = MatMul (n, wq)
        a = Attention <q_num_heads = 1, kv_num_heads = 1> (q, n, n)
        r = Add (x, a)
        last = RMSNormalization <axis = -1> (r, gamma)
        logits = MatMul (last, head)
    }}"""


def block(*, gamma: float = 1, factor: float = 1) -> ir.Model:
    rows = np.arange(1, 17).reshape(4, 4) * np.array([[1], [factor], [1], [1]])
    text = BLOCK.replace("GAMMA", str(gamma)).replace(
        "{Q}", "{" + ", ".join(map(str, rows.ravel())) + "}"
    )
    return ir.from_onnx_text(text)


def test_a_block_ends_where_the_next_norm_reads() -> None:
    assert block_outputs(block()) == ["r"]


def test_errors_of_outputs() -> None:
    feeds = [{"x": np.random.default_rng(i).normal(size=(1, 5, 4)).astype("f4")} for i in range(2)]
    same = output_errors(block(), block(), feeds, {"q", "r", "logits"})
    assert same == {"q": 0, "r": 0, "logits": 0}
    other = output_errors(block(), block(factor=1.5), feeds, {"q", "logits"})
    assert 0.01 < other["q"] < 1
    assert other["logits"] > 0


def test_factors_that_moved_into_a_norm_are_no_error() -> None:
    plain, scaled = block(), block(gamma=0.5, factor=2)
    with_integers(scaled)
    found = compare_layers(plain, scaled, [{"x": np.ones((1, 3, 4), np.float32)}])
    # Keys, values and the head read what is divided, and nothing makes up for it there.
    assert [layer.bits for layer in found.layers] == [8, 0]
    assert found.layers[0].weight == pytest.approx(0, abs=1e-6)
    assert found.layers[0].output == pytest.approx(0, abs=1e-5)
    assert found.layers[1].output > 0.01
    assert found.blocks[0] > 0.01


def with_integers(model: ir.Model) -> None:
    """Store wq as int8, exactly."""
    graph = model.graph
    weight = graph.initializers["wq"]
    codes = ir.val(
        "codes", const_value=ir.tensor(weight.const_value.numpy().astype(np.int8), name="codes")
    )
    scale = ir.val("scale", const_value=ir.tensor(np.ones(4, np.float32), name="scale"))
    for value in (codes, scale):
        graph.register_initializer(value)
    node = ir.node("DequantizeLinear", [codes, scale], {"axis": 1})
    node.outputs[0].name = "wide"
    graph.insert_before(product(model), node)
    product(model).replace_input_with(1, node.outputs[0])


@pytest.mark.parametrize("turned", [False, True])
def test_outputs_that_were_divided_are_no_error(turned: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 6)).astype(np.float32)
    by = (2.0 ** rng.uniform(-3, 3, 6)).astype(np.float32)
    x = rng.normal(size=(2, 5, 8)).astype(np.float32)
    shape, body = ("6, 8", "t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)")
    if not turned:
        shape, body = "8, 6", "y = MatMul (x, w)"
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float[B, S, 8] x, float[{shape}] w) => (float[B, S, 6] y) {{ {body} }}"""

    def made(numbers: np.ndarray) -> ir.Model:
        model = ir.from_onnx_text(text)
        value = model.graph.inputs.pop()
        stored = numbers.T.copy() if turned else numbers
        value.const_value = ir.Tensor(stored, name="w")
        model.graph.register_initializer(value)
        return model

    other = made(weight / by)
    QuantizeWeights(8).run(other)
    (product,) = (node for node in other.graph if node.op_type == "MatMul")
    assert compare_layers(made(weight), other, [{"x": x}]).layers[0].weight > 0.1
    product.metadata_props[OUTPUTS_DIVIDED] = "yes"
    (layer,) = compare_layers(made(weight), other, [{"x": x}]).layers
    assert 0 < layer.weight < 0.01
    assert 0 < layer.output < 0.01


def test_inputs_that_were_multiplied_are_no_error() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 2)).astype(np.float32)
    other = ir.from_onnx_text(FLOAT)
    reference = ir.from_onnx_text(FLOAT)
    by = np.array([[8], [1], [0.25], [2]], np.float32)
    for model, numbers in ((reference, weight), (other, weight * by)):
        model.graph.initializers["w"].const_value = ir.Tensor(numbers, name="w")
    QuantizeWeights(8).run(other)
    x = rng.normal(size=(3, 4)).astype(np.float32)
    (product,) = (node for node in other.graph if node.op_type == "MatMul")
    assert compare_layers(reference, other, [{"x": x}]).layers[0].weight > 0.5
    product.metadata_props[INPUTS_MULTIPLIED] = "yes"
    assert compare_layers(reference, other, [{"x": x}]).layers[0].weight < 0.05
