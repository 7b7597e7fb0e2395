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


@pytest.mark.parametrize("name", sorted(TARGET_OPS))
def test_the_table_and_the_body_agree(name: str) -> None:
    op = TARGET_OPS[name]
    body = op.function
    assert (body.domain, body.name) == ("npu", op.npu_name)
    assert list(body.input) == [item.name for item in op.inputs]
    assert list(body.output) == list(op.outputs)
    declared = {item.name: onnx.helper.get_attribute_value(item) for item in body.attribute_proto}
    assert declared == {item.name: item.default for item in op.attributes}
    assert 16 in op.opsets
    assert op.sources


@pytest.mark.parametrize(
    ("name", "shapes", "expected"),
    [
        ("NPURmsNorm", [(2, 3, 8), (8,)], [("FLOAT16", (2, 3, 8)), ("FLOAT", (2, 3, 1))]),
        ("NPURotaryMul", [(1, 3, 2, 8), (1, 3, 1, 8), (1, 3, 1, 8)], [("FLOAT16", (1, 3, 2, 8))]),
        ("NPUScaledMaskedSoftmax", [(1, 2, 32, 64)], [("FLOAT16", (1, 2, 32, 64))]),
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
