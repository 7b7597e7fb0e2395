"""Each target op's reference body runs on ONNX Runtime and equals its formula in numpy."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.ops import TARGET_OPS, is_target_op, reference_model

# fp16: one rounding at the end (2^-11) of values of a few units; fp32: a handful of roundings.
TOLERANCE = {"float": 1e-6, "float16": 4e-3}
NUMPY = {"float": np.float32, "float16": np.float16}


def run(model: ir.Model, feeds: dict[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(reference_model(model)).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    return list(session.run(None, feeds))


def parse(text: str, opset: int = 16) -> ir.Model:
    header = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    return ir.from_proto(onnx.parser.parse_model(header + text))


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_rms_norm_is_its_formula(dtype: str) -> None:
    model = parse(f"""
        norm ({dtype}[2,3,8] x, {dtype}[8] gamma) => ({dtype}[2,3,8] y, float[2,3,1] rstd)
        {{ y, rstd = NPURmsNorm (x, gamma) }}
    """)
    rng = np.random.default_rng(0)
    # Small enough that an epsilon of 1e-5 instead of 1e-6 would show.
    x = (rng.standard_normal((2, 3, 8)) * 1e-3).astype(NUMPY[dtype])
    gamma = rng.standard_normal(8).astype(NUMPY[dtype])

    y, rstd = run(model, {"x": x, "gamma": gamma})

    wide = x.astype(np.float32)
    expected = 1 / np.sqrt((wide**2).mean(-1, keepdims=True) + np.float32(1e-6))
    assert rstd.dtype == np.float32
    assert y.dtype == NUMPY[dtype]
    np.testing.assert_allclose(rstd, expected, rtol=1e-6)
    np.testing.assert_allclose(
        y.astype(np.float32),
        gamma.astype(np.float32) * wide * expected,
        atol=TOLERANCE[dtype],
        rtol=0,
    )


def test_rms_norm_of_fp16_does_not_overflow() -> None:
    """300^2 is beyond fp16: the body must square in fp32."""
    model = parse("""
        norm (float16[1,4] x, float16[4] gamma) => (float16[1,4] y)
        { y = NPURmsNorm (x, gamma) }
    """)
    x = np.full((1, 4), 300, np.float16)
    (y,) = run(model, {"x": x, "gamma": np.ones(4, np.float16)})
    np.testing.assert_array_equal(y, np.ones((1, 4), np.float16))


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_rotary_mul_is_the_half_style(dtype: str) -> None:
    model = parse(f"""
        rotate ({dtype}[1,3,2,8] x, {dtype}[1,3,1,8] r1, {dtype}[1,3,1,8] r2)
            => ({dtype}[1,3,2,8] y)
        {{ y = NPURotaryMul (x, r1, r2) }}
    """)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 3, 2, 8)).astype(NUMPY[dtype])
    r1, r2 = (rng.standard_normal((1, 3, 1, 8)).astype(NUMPY[dtype]) for _ in range(2))

    (y,) = run(model, {"x": x, "r1": r1, "r2": r2})

    wide = x.astype(np.float32)
    turned = np.concatenate([-wide[..., 4:], wide[..., :4]], axis=-1)
    expected = r1.astype(np.float32) * wide + r2.astype(np.float32) * turned
    assert y.dtype == NUMPY[dtype]
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_scaled_masked_softmax_masks_what_is_true(dtype: str, scale: float | None) -> None:
    attribute = "" if scale is None else f"<scale: float = {scale}>"
    model = parse(f"""
        attend ({dtype}[1,2,4,4] x, bool[1,1,4,4] mask) => ({dtype}[1,2,4,4] y)
        {{ y = NPUScaledMaskedSoftmax {attribute} (x, mask) }}
    """)
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((1, 2, 4, 4)) * 3).astype(NUMPY[dtype])
    mask = np.triu(np.ones((1, 1, 4, 4), bool), 1)

    (y,) = run(model, {"x": x, "mask": mask})

    scores = np.where(mask, -1e4, x.astype(np.float32) * (1.0 if scale is None else scale))
    share = np.exp(scores - scores.max(-1, keepdims=True))
    expected = share / share.sum(-1, keepdims=True)
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=TOLERANCE[dtype], rtol=0)
    assert y.dtype == NUMPY[dtype]


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_add_rms_norm_gives_the_sum_beside_the_norm(dtype: str) -> None:
    model = parse(f"""
        norm ({dtype}[2,8] a, {dtype}[2,8] b, {dtype}[8] gamma) => ({dtype}[2,8] y, {dtype}[2,8] x)
        {{ y, rstd, x = NPUAddRmsNorm (a, b, gamma) }}
    """)
    rng = np.random.default_rng(3)
    a, b = (rng.standard_normal((2, 8)).astype(NUMPY[dtype]) for _ in range(2))
    y, x = run(model, {"a": a, "b": b, "gamma": np.full(8, 2, NUMPY[dtype])})
    np.testing.assert_array_equal(x, a + b)
    wide = (a + b).astype(np.float32)
    expected = 2 * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_fast_gelu_is_a_swish_of_1_702(dtype: str) -> None:
    model = parse(f"g ({dtype}[64] x) => ({dtype}[64] y) {{ y = NPUFastGelu (x) }}")
    x = np.linspace(-9, 9, 64).astype(NUMPY[dtype])
    (y,) = run(model, {"x": x})
    wide = x.astype(np.float64)
    expected = wide / (1 + np.exp(-1.702 * wide))
    np.testing.assert_allclose(y.astype(np.float64), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("mode", [0, 1])
def test_rotary_position_embedding_turns_halves_or_pairs(mode: int) -> None:
    model = parse(f"""
        rotate (float[2,3,2,8] x, float[2,3,1,8] cos, float[2,3,1,8] sin) => (float[2,3,2,8] y)
        {{ y = NPURotaryPositionEmbedding <mode = {mode}> (x, cos, sin) }}
    """)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 3, 2, 8)).astype(np.float32)
    cos, sin = (rng.standard_normal((2, 3, 1, 8)).astype(np.float32) for _ in range(2))
    (y,) = run(model, {"x": x, "cos": cos, "sin": sin})
    if mode == 0:
        turned = np.concatenate([-x[..., 4:], x[..., :4]], axis=-1)
    else:
        turned = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    np.testing.assert_allclose(y, x * cos + turned * sin, atol=1e-6, rtol=0)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_prompt_flash_attention_is_attention(heads: tuple[int, int]) -> None:
    query, kv = heads
    model = parse(f"""
        attend (float16[2,{query},3,8] q, float16[2,{kv},5,8] k, float16[2,{kv},5,8] v,
                float16[0] pse, bool[2,1,3,5] mask) => (float16[2,{query},3,8] y)
        {{ y = NPUPromptFlashAttention <num_heads = {query}, input_layout = "BNSD",
                scale_value: float = 0.5, pre_tokens = 2147483647, num_key_value_heads = {kv}>
                (q, k, v, pse, mask) }}
    """)
    rng = np.random.default_rng(5)
    q, k, v = (
        rng.standard_normal((2, count, length, 8)).astype(np.float16)
        for count, length in ((query, 3), (kv, 5), (kv, 5))
    )
    mask = np.broadcast_to(np.triu(np.ones((3, 5), bool), 3), (2, 1, 3, 5))
    (y,) = run(model, {"q": q, "k": k, "v": v, "pse": np.zeros(0, np.float16), "mask": mask})
    keys, values = (part.astype(np.float32).repeat(query // kv, axis=1) for part in (k, v))
    scores = np.where(mask, -1e9, 0.5 * q.astype(np.float32) @ keys.swapaxes(2, 3))
    share = np.exp(scores - scores.max(-1, keepdims=True))
    expected = share / share.sum(-1, keepdims=True) @ values
    np.testing.assert_allclose(y.astype(np.float32), expected, atol=TOLERANCE["float16"], rtol=0)


@pytest.mark.parametrize("name", sorted(TARGET_OPS))
def test_the_table_and_the_body_agree(name: str) -> None:
    op = TARGET_OPS[name]
    body = op.function
    assert (body.domain, body.name) == ("npu", op.npu_name)
    assert list(body.input) == [item.name for item in op.inputs]
    assert list(body.output) == list(op.outputs)
    declared = {item.name: onnx.helper.get_attribute_value(item) for item in body.attribute_proto}
    declared = {k: v.decode() if isinstance(v, bytes) else v for k, v in declared.items()}
    declared |= dict.fromkeys(body.attribute)  # those without a default
    assert declared == {item.name: item.default for item in op.attributes}
    assert set(body.attribute) == {item.name for item in op.attributes if item.required}
    assert 16 in op.opsets
    assert op.sources


@pytest.mark.parametrize(
    ("name", "shapes", "expected"),
    [
        ("NPURmsNorm", [(2, 3, 8), (8,)], [("FLOAT16", (2, 3, 8)), ("FLOAT", (2, 3, 1))]),
        ("NPURotaryMul", [(1, 3, 2, 8), (1, 3, 1, 8), (1, 3, 1, 8)], [("FLOAT16", (1, 3, 2, 8))]),
        ("NPUScaledMaskedSoftmax", [(1, 2, 32, 64)], [("FLOAT16", (1, 2, 32, 64))]),
        (
            "NPUAddRmsNorm",
            [(2, 3, 8), (2, 3, 8), (8,)],
            [("FLOAT16", (2, 3, 8)), ("FLOAT", (2, 3, 1)), ("FLOAT16", (2, 3, 8))],
        ),
        (
            "NPUPromptFlashAttention",
            [(1, 4, 2, 8), (1, 2, 6, 8), (1, 2, 6, 8)],
            [("FLOAT16", (1, 4, 2, 8))],
        ),
    ],
)
def test_output_shapes(
    name: str, shapes: list[tuple[int, ...]], expected: list[tuple[str, tuple[int, ...]]]
) -> None:
    given = [(ir.DataType.FLOAT16, shape) for shape in shapes]
    found = TARGET_OPS[name].infer(given)
    assert [(dtype.name, shape) for dtype, shape in found] == expected


def test_the_twin_leaves_the_model_alone_and_shares_its_tensors() -> None:
    model = parse("""
        norm (float[1,4] x) => (float[1,4] y)
        <float[4] gamma = {1.0, 2.0, 3.0, 4.0}>
        { h = NPURmsNorm (x, gamma)  y = Relu (h) }
    """)
    twin = reference_model(model)
    assert [(node.domain, node.op_type) for node in model.graph] == [
        ("", "NPURmsNorm"),
        ("", "Relu"),
    ]
    assert not model.functions
    assert dict(model.graph.opset_imports) == {"": 16}
    assert [(node.domain, node.op_type) for node in twin.graph] == [
        ("npu", "NPURmsNorm"),
        ("", "Relu"),
    ]
    assert list(twin.functions) == [("npu", "NPURmsNorm", "")]
    assert dict(twin.graph.opset_imports) == {"": 16, "npu": 1}
    ours = model.graph.initializers["gamma"].const_value
    assert twin.graph.initializers["gamma"].const_value is ours


def test_a_model_without_target_ops_gets_no_functions() -> None:
    twin = reference_model(parse("g (float[1] x) => (float[1] y) { y = Relu (x) }"))
    assert not twin.functions
    assert dict(twin.graph.opset_imports) == {"": 16}


def test_target_ops_are_known_in_the_default_domain_only() -> None:
    assert is_target_op(ir.node("NPURmsNorm", []))
    assert not is_target_op(ir.node("NPURmsNorm", [], domain="npu"))
    assert not is_target_op(ir.node("Relu", []))


@pytest.mark.parametrize("opset", [14, 18, 24])
def test_an_opset_that_the_bodies_are_not_written_for_is_refused(opset: int) -> None:
    model = parse("g (float[1] x) => (float[1] y) { y = Relu (x) }", opset)
    with pytest.raises(InputError, match=f"opset {opset}"):
        reference_model(model)
