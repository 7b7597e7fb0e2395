"""RotaryEmbedding lowered, against ONNX Runtime's own."""

from typing import Any

import numpy as np
import pytest

from omforge import ir
from omforge.lowering.legalize import NOT_LEGALIZED, legalize
from omforge.lowering.target import target

NUMPY = {"float": np.float32, "float16": np.float16}


def rotary(
    batch: int, tokens: int, heads: int, size: int, dtype: str = "float", attributes: str = ""
) -> str:
    rotated = size // 2 if "rotary_embedding_dim" in attributes else size
    table = f"{dtype}[{batch},{tokens},{rotated // 2}]"
    return f"""
        rotate ({dtype}[{batch},{tokens},{heads * size}] x, {table} cos, {table} sin)
            => ({dtype}[{batch},{tokens},{heads * size}] y)
        {{ y = RotaryEmbedding <num_heads = {heads} {attributes}> (x, cos, sin) }}
    """


def feeds(
    batch: int, tokens: int, heads: int, size: int, dtype: str = "float", rotated: int | None = None
) -> dict[str, Any]:
    rng = np.random.default_rng(size + tokens)
    half = (rotated or size) // 2
    angle = rng.uniform(-3, 3, (batch, tokens, half))
    return {
        "x": rng.standard_normal((batch, tokens, heads * size)).astype(NUMPY[dtype]),
        "cos": np.cos(angle).astype(NUMPY[dtype]),
        "sin": np.sin(angle).astype(NUMPY[dtype]),
    }


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_half_style(lower: Any, batch: int, tokens: int, dtype: str) -> None:
    lowered = lower(rotary(batch, tokens, 4, 16, dtype), feeds(batch, tokens, 4, 16, dtype))
    assert "NPURotaryMul" not in lowered.ops
    assert {"Split", "Neg", "Concat", "Mul", "Add"} <= set(lowered.ops)


@pytest.mark.parametrize("tokens", [1, 5])
def test_interleaved(lower: Any, tokens: int) -> None:
    text = rotary(2, tokens, 4, 16, attributes=", interleaved = 1")
    lower(text, feeds(2, tokens, 4, 16))


@pytest.mark.parametrize("interleaved", [0, 1])
def test_partial(lower: Any, interleaved: int) -> None:
    attributes = f", rotary_embedding_dim = 8, interleaved = {interleaved}"
    lower(rotary(2, 3, 4, 16, attributes=attributes), feeds(2, 3, 4, 16, rotated=8))


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_head_of_128_at_batch_1_is_rotary_mul(lower: Any, tokens: int, dtype: str) -> None:
    lowered = lower(rotary(1, tokens, 2, 128, dtype), feeds(1, tokens, 2, 128, dtype))
    assert lowered.ops.count("NPURotaryMul") == 1
    (node,) = (node for node in lowered.model.graph if node.op_type == "NPURotaryMul")
    shapes = [list(value.shape) for value in node.inputs if value is not None and value.shape]
    assert shapes == [[1, tokens, 2, 128], [1, tokens, 1, 128], [1, tokens, 1, 128]]


@pytest.mark.parametrize(
    ("batch", "tokens", "size", "attributes"),
    [
        (2, 3, 128, ""),  # r1 and r2 broadcast over the batch
        (1, 1025, 128, ""),
        (1, 3, 64, ""),
        (1, 3, 128, ", interleaved = 1"),
    ],
)
def test_beyond_the_limits_of_rotary_mul_it_is_decomposed(
    lower: Any, batch: int, tokens: int, size: int, attributes: str
) -> None:
    text = rotary(batch, tokens, 2, size, attributes=attributes)
    assert "NPURotaryMul" not in lower(text, feeds(batch, tokens, 2, size)).ops


@pytest.mark.parametrize(("tokens", "fused"), [(1, False), (2, True)])
def test_heads_before_tokens(lower: Any, tokens: int, fused: bool) -> None:
    """[B, N, S, D] with N > 8*S is outside the documented range of NPURotaryMul."""
    given = feeds(1, tokens, 1, 128)
    x = np.random.default_rng(0).standard_normal((1, 9, tokens, 128)).astype(np.float32)
    text = f"""
        rotate (float[1,9,{tokens},128] x, float[1,{tokens},64] cos, float[1,{tokens},64] sin)
            => (float[1,9,{tokens},128] y)
        {{ y = RotaryEmbedding (x, cos, sin) }}
    """
    lowered = lower(text, {**given, "x": x})
    assert ("NPURotaryMul" in lowered.ops) == fused


def test_tables_with_positions_are_gathered(lower: Any) -> None:
    rng = np.random.default_rng(0)
    angle = rng.uniform(-3, 3, (9, 8))
    text = """
        rotate (float[2,3,32] x, float[9,8] cos, float[9,8] sin, int64[2,3] position_ids)
            => (float[2,3,32] y)
        { y = RotaryEmbedding <num_heads = 2> (x, cos, sin, position_ids) }
    """
    lowered = lower(
        text,
        {
            "x": rng.standard_normal((2, 3, 32)).astype(np.float32),
            "cos": np.cos(angle).astype(np.float32),
            "sin": np.sin(angle).astype(np.float32),
            "position_ids": np.array([[0, 1, 2], [8, 7, 3]]),
        },
    )
    assert lowered.consumers("position_ids") == {"Gather"}


def test_the_tables_are_widened_once_for_all_layers(lower: Any) -> None:
    text = """
        rotate (float[1,3,32] x, float[1,3,8] cos, float[1,3,8] sin) => (float[1,3,32] y)
        {
            h = RotaryEmbedding <num_heads = 2> (x, cos, sin)
            y = RotaryEmbedding <num_heads = 2> (h, cos, sin)
        }
    """
    lowered = lower(text, feeds(1, 3, 2, 16))
    assert lowered.replaced == 2
    assert lowered.consumers("cos") == {"Concat"}
    assert lowered.ops.count("Concat") == 4  # one for cos, one for sin, one in each rotation


def test_a_table_of_another_width_is_refused(text_to_model: Any) -> None:
    model: ir.Model = text_to_model(rotary(1, 3, 2, 16).replace("3,8]", "3,4]"))
    assert legalize(model, target("Ascend310P3")) == 0
    (node,) = list(model.graph)
    assert "must be [B, S, 8]" in node.metadata_props[NOT_LEGALIZED]


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("attributes", ["", ", interleaved = 1", ", rotary_embedding_dim = 8"])
def test_rotary_position_embedding_where_that_is_asked_for(
    lower: Any, attributes: str, dtype: str
) -> None:
    form = "NPURotaryPositionEmbedding"
    rotated = 8 if "dim" in attributes else 16
    lowered = lower(
        rotary(2, 3, 4, 16, dtype, attributes),
        feeds(2, 3, 4, 16, dtype, rotated=rotated),
        soc="Ascend910B4",
        forms={"RotaryEmbedding": form},
    )
    (node,) = (node for node in lowered.model.graph if node.op_type == form)
    assert node.attributes["mode"].as_int() == ("interleaved" in attributes)


def test_gears_decide_together(text_to_model: Any) -> None:
    """2,000 tokens are beyond NPURotaryMul; a graph whose length may be that has no use for it."""
    text = """
        rotate (float16[1,"seq",512] x, float16[1,"seq",64] cos, float16[1,"seq",64] sin)
            => (float16[1,"seq",512] y)
        { y = RotaryEmbedding <num_heads = 4> (x, cos, sin) }
    """
    for longest, fused in ((1024, True), (2000, False)):
        model = text_to_model(text)
        legalize(model, target("Ascend310P3"), gears={"seq": (1, longest)})
        assert ("NPURotaryMul" in {node.op_type for node in model.graph}) == fused
