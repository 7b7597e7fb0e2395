"""What lies between the products of an attention: the spellings, and the near misses of each."""

import dataclasses

import pytest

from omforge import ir
from omforge.ir.dims import parse_dim
from omforge.passes.fuse_attention import FuseAttention
from omforge.recognition.attention.scores import find_scores, joined_heads
from omforge.rewriting.events import events
from omforge.rewriting.match import NoMatch
from tests.passes.blocks import LOW, Block, fused, named, ops

INFINITE = -float("inf")
LOWEST = -3.4028234663852886e38


def edited(block: Block, changes: dict[str, str]) -> Block:
    """The block with its text changed, and a few more constants."""
    more = (
        f"<float lowest = {{{LOWEST}}}, float minus_9 = {{-1e9}}, float minus_4 = {{-1e4}}, float one_f = {{1}}, int64[1] j_m1 = {{-1}}, "
        "int64[1] j_2 = {2}, int64[1] j_4 = {4}, int64[1] j_8 = {8}, float[16, 8] table"
    )
    return dataclasses.replace(block, edits=(*changes.items(), ("<float[16, 8] table", more)))


SPELLINGS = {
    "a mask before the scale": (
        Block(),
        {"masked = Add (scaled, bias)": "late = Add (scaled, bias) masked = Mul (late, scale)"},
    ),
    "a mask before a division": (
        Block(scale="div"),
        {"masked = Add (scaled, bias)": "late = Add (scaled, bias) masked = Div (late, scale)"},
    ),
    "hidden scores before the scale": (
        Block(applied="where"),
        {
            "masked = Where (seen, scaled, low)": "late = Where (seen, scaled, low) masked = Mul (late, scale)"
        },
    ),
    "heads joined to the batch for the scores alone": (
        Block(size=8),
        {
            "scores = MatMul (q4, kt)": (
                "rows = Mul (batch1, j_4) q_shape = Concat <axis = 0> (rows, seq1, j_8)"
                " qj = Reshape (q4, q_shape) k_shape = Concat <axis = 0> (rows, total1, j_8)"
                " kj = Reshape (present_key_n, k_shape) kjt = Transpose <perm = [0, 2, 1]> (kj)"
                " sj = MatMul (qj, kjt) s_shape = Concat <axis = 0> (batch1, j_4, seq1, total1)"
                " scores = Reshape (sj, s_shape)"
            )
        },
    ),
    "multiplied by ones and zeros": (
        Block(padding=False),
        {
            "masked = Add (scaled, bias)": (
                "shown_1 = Cast <to = 1> (seen) one_less = Sub (one_f, shown_1)"
                " kept = Mul (scaled, shown_1) taken = Mul (one_less, minus_4)"
                " masked = Add (kept, taken)"
            )
        },
    ),
    "a floor": (
        Block(),
        {"masked = Add (scaled, bias)": "late = Add (scaled, bias) masked = Max (late, lowest)"},
    ),
    "a floor on the left": (
        Block(),
        {"masked = Add (scaled, bias)": "late = Add (scaled, bias) masked = Max (lowest, late)"},
    ),
    "a floor under minus infinity": (
        Block(low=INFINITE),
        {"masked = Add (scaled, bias)": "late = Add (scaled, bias) masked = Max (late, lowest)"},
    ),
    "a floor under the scores": (
        Block(),
        {"masked = Add (scaled, bias)": "late = Max (scaled, lowest) masked = Add (late, bias)"},
    ),
    "the largest taken off": (
        Block(),
        {
            "masked = Add (scaled, bias)": (
                "late = Add (scaled, bias) most = ReduceMax <keepdims = 1> (late, j_m1)"
                " masked = Sub (late, most)"
            )
        },
    ),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_raises_every_spelling(case: str) -> None:
    block, changes = SPELLINGS[case]
    model = fused(FuseAttention(), edited(block, changes))
    assert {"Softmax", "Max", "Sub", "ReduceMax"}.isdisjoint(ops(model))
    assert ops(model).count("Attention") == 1
    assert not events(model)


def test_a_scale_behind_the_mask_is_part_of_the_scale() -> None:
    block, changes = SPELLINGS["a mask before the scale"]
    model = fused(FuseAttention(), edited(block, changes))
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    assert node.attributes["scale"].as_float() == pytest.approx(0.36)


NEAR_MISSES = {
    "a floor that scores reach": (
        Block(),
        {"masked = Add (scaled, bias)": "late = Max (scaled, zero) masked = Add (late, bias)"},
        "scores below 0 are cut off",
    ),
    "a floor that masks reach": (
        Block(),
        {"masked = Add (scaled, bias)": "late = Add (scaled, bias) masked = Max (late, minus_9)"},
        "scores below -1e+09 are cut off",
    ),
    "the larger of three": (
        Block(),
        {
            "masked = Add (scaled, bias)": "late = Add (scaled, bias) masked = Max (late, lowest, low)"
        },
        "compared with what is not one number",
    ),
    "the larger of two scores": (
        Block(),
        {"masked = Add (scaled, bias)": "late = Add (scaled, bias) masked = Max (late, scores)"},
        "compared with what is not one number",
    ),
    "the largest of each key taken off": (
        Block(),
        {
            "masked = Add (scaled, bias)": (
                "late = Add (scaled, bias) most = ReduceMax <keepdims = 1> (late, j_2)"
                " masked = Sub (late, most)"
            )
        },
        "is not their largest",
    ),
    "the largest of other scores taken off": (
        Block(),
        {
            "masked = Add (scaled, bias)": (
                "late = Add (scaled, bias) most = ReduceMax <keepdims = 1> (scaled, j_m1)"
                " masked = Sub (late, most)"
            )
        },
        "is not their largest",
    ),
    "the smallest taken off": (
        Block(),
        {
            "masked = Add (scaled, bias)": (
                "late = Add (scaled, bias) most = ReduceMin <keepdims = 1> (late, j_m1)"
                " masked = Sub (late, most)"
            )
        },
        "is not their largest",
    ),
    "taken off the largest": (
        Block(),
        {
            "masked = Add (scaled, bias)": (
                "late = Add (scaled, bias) most = ReduceMax <keepdims = 1> (late, j_m1)"
                " masked = Sub (most, late)"
            )
        },
        "is not their largest",
    ),
    "a weak mask before the scale": (
        Block(low=-1200.0),
        {"masked = Add (scaled, bias)": "late = Add (scaled, bias) masked = Mul (late, scale)"},
        "it adds more than a mask",
    ),
    "a bias before the scale": (
        Block(low=LOW),
        {
            "float zero = {0.0}": "float zero = {0.5}",
            "masked = Add (scaled, bias)": "late = Add (scaled, bias) masked = Mul (late, scale)",
        },
        "it adds more than a mask",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_leaves_alone(case: str) -> None:
    block, changes, why = NEAR_MISSES[case]
    model = named(edited(block, changes))
    assert FuseAttention().run(model) == 0
    (event,) = events(model)
    assert why in event.reason


@pytest.mark.parametrize(
    ("first", "batch", "heads"),
    [
        ("4*batch", "batch", 4),
        ("batch", "batch", 1),
        ("6", "2", 3),
        ("6", "4", None),
        ("batch", "2", None),
        ("4*batch + 1", "batch", None),
        ("batch*seq", "batch", None),
        ("1", "2", None),
    ],
)
def test_counts_heads_that_are_joined_to_the_batch(
    first: str, batch: str, heads: int | None
) -> None:
    value = ir.Value(
        name="scores", shape=ir.Shape([first if not first.isdigit() else int(first), 3, 5])
    )
    whole = int(batch) if batch.isdigit() else parse_dim(batch)
    assert joined_heads(value, whole) == heads


def test_a_rank_that_is_not_known_reads_as_a_sentence() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 24]> g (float[B, S] x) => (y) { y = Softmax (x) }'
    )
    softmax = model.graph[0]
    softmax.inputs[0].shape = None  # type: ignore[union-attr]
    with pytest.raises(NoMatch, match="axis -1 of a tensor of unknown rank"):
        find_scores(softmax, set())
