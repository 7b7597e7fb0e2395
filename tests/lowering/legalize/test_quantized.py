"""Products with quantised weights: the target's operator gives what DequantizeLinear gives."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omforge import ir
from omforge.ir.numerics import run
from omforge.ir.ops import reference_model
from omforge.lowering.legality import check_legal
from omforge.lowering.legalize import legalize
from omforge.lowering.legalize.quantized import INT4_FORM, LARGEST, OP, blocks
from omforge.lowering.target import target
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.passes.turn_weights import TurnWeights
from tests.quantization.weights import weighted

A2, A310P, A310B = "Ascend910B4", "Ascend310P3", "Ascend310B1"


def product(inputs: int, outputs: int, turned: bool = False, rows: str = "2, 3") -> ir.Model:
    """A float16 product of x [.., K] with a random weight [K, N], or [N, K] behind a Transpose."""
    shape = f"{outputs}, {inputs}" if turned else f"{inputs}, {outputs}"
    body = "t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)" if turned else "y = MatMul (x, w)"
    return weighted(
        ir.from_onnx_text(f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[{rows}, {inputs}] x, float16[{shape}] w) => (float16[{rows}, {outputs}] y)
        {{ {body} }}"""),
        1,
    )


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    """Random numbers for x."""
    (x,) = (value for value in model.graph.inputs if value.name == "x")
    assert x.shape is not None
    rng = np.random.default_rng(1)
    return {"x": rng.normal(size=tuple(x.shape.numpy())).astype(np.float16)}


def lowered(model: ir.Model, soc: str = A2, form: str = OP) -> ir.Model:
    """The model in the target's dialect, which must be legal."""
    other = model.clone()
    legalize(other, target(soc), forms={"QuantizedMatMul": form})
    found = check_legal(other, target(soc))
    assert not found, "; ".join(map(str, found))
    return other


def ops(model: ir.Model) -> list[str]:
    """The operators in order."""
    return [node.op_type for node in model.graph]


def agrees(model: ir.Model, other: ir.Model) -> None:
    """Both give the same numbers, but for the roundings of K float16 products."""
    expected = run(model, feeds(model))["y"].astype(np.float64)
    found = run(reference_model(other), feeds(model))["y"].astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=4e-3, atol=4e-3 * np.abs(expected).max())


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.integers(2, 210),
    outputs=st.integers(1, 90),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([0, 32, 64, 128]),
    symmetric=st.booleans(),
    turned=st.booleans(),
    form=st.sampled_from([OP, INT4_FORM]),
    hole=st.booleans(),
)
def test_the_lowered_form_gives_what_the_canonical_one_gives(
    inputs: int,
    outputs: int,
    bits: int,
    group: int,
    symmetric: bool,
    turned: bool,
    form: str,
    hole: bool,
) -> None:
    """Odd K, K no multiple of the group, N no multiple of 8, groups of zeros."""
    step = (8 if form == OP else 2) if bits == 4 else 1
    if turned:
        inputs = -(-inputs // step) * step
    else:
        outputs = -(-outputs // step) * step
    model = product(inputs, outputs, turned)
    if hole:
        numbers = model.graph.initializers["w"].const_value.numpy()
        np.moveaxis(numbers, -1 if turned else 0, 0)[: max(1, inputs // 2)] = 0
    QuantizeWeights(bits, group, symmetric).run(model)
    other = lowered(model, form=form)
    assert OP in ops(other)
    assert "DequantizeLinear" not in ops(other)
    agrees(model, other)


def test_before_and_after() -> None:
    model = product(64, 16)
    QuantizeWeights(4, 32, symmetric=False).run(model)
    other = lowered(model)
    assert ops(other) == ["Reshape", OP, "Reshape"]
    node = other.graph[1]
    x, weight, scale, offset = node.inputs
    assert (x.shape, x.dtype) == ([6, 64], ir.DataType.FLOAT16)
    assert (weight.shape, weight.dtype) == ([64, 2], ir.DataType.INT32)
    assert (scale.shape, scale.dtype) == ([2, 16], ir.DataType.FLOAT16)
    assert (offset.shape, offset.dtype) == ([2, 16], ir.DataType.FLOAT16)
    zero = model.graph.initializers["w_zero_point"].const_value.numpy().astype(np.float16)
    np.testing.assert_array_equal(offset.const_value.numpy(), -zero)
    assert {name: a.value for name, a in node.attributes.items()} == {"antiquant_group_size": 32}


def test_a_turned_weight_stays_turned_with_its_scales() -> None:
    model = product(64, 12, turned=True)
    QuantizeWeights(4, 32).run(model)
    other = lowered(model)
    assert ops(other) == ["Reshape", "Transpose", "Transpose", OP, "Reshape"]
    weight, scale = (node.inputs[0] for node in list(other.graph)[1:3])
    assert (weight.shape, weight.dtype) == ([12, 8], ir.DataType.INT32)
    assert scale.shape == [12, 2]


def test_a_gemm_is_a_product_and_a_sum() -> None:
    model = weighted(
        ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[3, 32] x, float16[16, 32] w, float16[16] b) => (float16[3, 16] y)
        { y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b) }"""),
        1,
    )
    QuantizeWeights(8).run(model)
    other = lowered(model)
    assert [op for op in ops(other) if op not in ("Mul", "Transpose")] == [OP, "Add"]
    agrees(model, other)


def test_one_file_holds_the_integers_of_both_levels_once(tmp_path: Path) -> None:
    model = product(256, 512)
    QuantizeWeights(4, 32).run(model)
    other = lowered(model)
    with ir.WeightWriter(tmp_path / "w.bin") as writer:
        ir.save(model, tmp_path / "a.onnx", writer=writer)
        size = writer._end
        ir.save(other, tmp_path / "b.onnx", writer=writer)
        assert writer._end == size
    agrees(ir.load(tmp_path / "a.onnx"), ir.load(tmp_path / "b.onnx"))


def test_a_head_of_many_outputs_is_cut_into_rows_of_the_same_bytes(tmp_path: Path) -> None:
    model = product(32, LARGEST + 1001, turned=True, rows="1, 2")
    QuantizeWeights(4, symmetric=False).run(model)
    other = lowered(model)
    assert ops(other).count(OP) == 2
    assert "Concat" in ops(other)
    with ir.WeightWriter(tmp_path / "w.bin") as writer:
        ir.save(model, tmp_path / "a.onnx", writer=writer)
        integers = (LARGEST + 1001) * 16
        size = writer._end
        ir.save(other, tmp_path / "b.onnx", writer=writer)
        assert writer._end - size < integers / 2  # offsets in float16, and nothing else
    agrees(model, ir.load(tmp_path / "b.onnx"))


@pytest.mark.parametrize("outputs", [1, 65535, 65536, 128256, 151936, 262144])
def test_blocks_cover_every_output_once(outputs: int) -> None:
    found = list(blocks(outputs))
    assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])]
    assert found[-1][1] == outputs
    assert all(last - first <= LARGEST for first, last in found)
    assert all(first % 64 == 0 for first, _ in found)


def refusal(model: ir.Model, soc: str) -> str:
    """What the legality check says of the weight that was not lowered."""
    other = model.clone()
    legalize(other, target(soc))
    return "; ".join(str(d) for d in check_legal(other, target(soc)) if "legalisation" in str(d))


@pytest.mark.parametrize(
    ("soc", "step", "shape", "reason"),
    [
        (A310B, QuantizeWeights(8), (64, 16, True), "310b does not have it"),
        (A310P, QuantizeWeights(4), (64, 16, True), "310P has no int4 weights: it has int8"),
        (A310P, QuantizeWeights(8, 32), (64, 16, True), "no int8 weights in groups"),
        (A310P, QuantizeWeights(8), (64, 16, False), "turn-weights"),
        (A2, QuantizeWeights(4), (64, 12, False), "N is 12: eight int4 make an int32"),
        (A2, QuantizeWeights(4), (60, 16, True), "K is 60: eight int4"),
        (A2, QuantizeWeights(8), (LARGEST + 1, 16, False), "65536 inputs"),
        (A2, QuantizeWeights(8), (4, LARGEST + 1, False), "turn-weights stores it"),
    ],
)
def test_what_no_kernel_takes_is_refused_in_words(
    soc: str, step: QuantizeWeights, shape: tuple[int, int, bool], reason: str
) -> None:
    model = product(*shape)
    step.run(model)
    assert reason in refusal(model, soc)


def test_float32_has_no_kernel() -> None:
    model = weighted(
        ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
        g (float[3, 32] x, float[32, 16] w) => (float[3, 16] y) { y = MatMul (x, w) }"""),
        1,
    )
    QuantizeWeights(8).run(model)
    assert "x is FLOAT, the kernel takes float16" in refusal(model, A2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_310p_takes_int8_per_channel_through_a_transpose(symmetric: bool) -> None:
    model = product(48, 20)
    QuantizeWeights(8, symmetric=symmetric).run(model)
    assert TurnWeights().run(model) == 1
    other = lowered(model, A310P)
    assert ops(other) == ["Reshape", "Transpose", OP, "Reshape"]
    agrees(model, other)


TIED = """<ir_version: 11, opset_import: ["" : 24]>
tied (int64[2, 3] ids, float16[50, 64] embedding) => (float16[2, 3, 50] y)
{
    x = Gather (embedding, ids)
    head = Transpose <perm = [1, 0]> (embedding)
    y = MatMul (x, head)
}"""


@pytest.mark.parametrize("soc", [A2, A310P])
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 32), (4, 0), (4, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_rows_of_a_tied_embedding_are_legal_everywhere(
    soc: str, bits: int, group: int, symmetric: bool
) -> None:
    if soc == A310P and (bits, group) != (8, 0):
        pytest.skip("310P has int8 per channel only")
    model = weighted(ir.from_onnx_text(TIED), 1)
    QuantizeWeights(bits, group, symmetric).run(model)
    other = lowered(model, soc)
    given_ids = np.array([[0, 7, 49], [3, 3, 1]])
    expected = run(model, {"ids": given_ids})["y"].astype(np.float64)
    found = run(reference_model(other), {"ids": given_ids.astype(np.int32)})["y"]
    np.testing.assert_allclose(found.astype(np.float64), expected, atol=4e-3, rtol=4e-3)
