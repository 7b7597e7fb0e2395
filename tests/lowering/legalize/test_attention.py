"""Attention lowered to MatMul and Softmax, against ONNX Runtime's own Attention."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from omforge import ir
from omforge.lowering.legalize import NOT_LEGALIZED, legalize
from omforge.lowering.target import target

NUMPY = {"float": np.float32, "float16": np.float16}
HEAD, CAPACITY = 8, 6
MASKED = -30000.0


def attention(
    batch: int,
    new: int,
    heads: tuple[int, int],
    dtype: str = "float",
    *,
    mask: str | None = None,
    attributes: str = "",
    head: int = HEAD,
) -> str:
    """The text of one 3-D attention over a cache; `mask` is the mask's type, "" for none.

    ONNX Runtime wants the present outputs named where there is a past, read or not.
    """
    query, kv = heads
    if mask is None:
        mask = f"{dtype}[{batch},1,{new},{CAPACITY + new}]"
    cache = f"{dtype}[{batch},{kv},{CAPACITY},{head}]"
    return f"""
        attend ({dtype}[{batch},{new},{query * head}] q, {dtype}[{batch},{new},{kv * head}] k,
                {dtype}[{batch},{new},{kv * head}] v, {cache} past_k, {cache} past_v
                {", " + mask + " mask" if mask else ""})
            => ({dtype}[{batch},{new},{query * head}] y)
        {{ y, present_k, present_v = Attention
                <q_num_heads = {query}, kv_num_heads = {kv} {attributes}>
                (q, k, v, {"mask" if mask else ""}, past_k, past_v) }}
    """


def feeds(
    batch: int, new: int, heads: tuple[int, int], dtype: str = "float", *, head: int = HEAD
) -> dict[str, Any]:
    rng = np.random.default_rng(batch * 100 + new)
    query, kv = heads

    def numbers(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(NUMPY[dtype])

    return {
        "q": numbers(batch, new, query * head),
        "k": numbers(batch, new, kv * head),
        "v": numbers(batch, new, kv * head),
        "past_k": numbers(batch, kv, CAPACITY, head),
        "past_v": numbers(batch, kv, CAPACITY, head),
        "mask": causal_mask(batch, new, valid=4, window=None).astype(NUMPY[dtype]),
    }


def causal_mask(batch: int, new: int, valid: int, window: int | None) -> Any:
    """Additive [B, 1, S, C+S]: row b has `valid - b` slots filled, what is beyond is masked."""
    mask = np.full((batch, 1, new, CAPACITY + new), MASKED)
    for row in range(batch):
        for token in range(new):
            at = valid - row + token
            slots = [*range(valid - row), *range(CAPACITY, CAPACITY + token + 1)]
            positions = [*range(valid - row), *range(valid - row, at + 1)]
            for slot, position in zip(slots, positions, strict=True):
                if window is None or at - position < window:
                    mask[row, 0, token, slot] = 0
    return mask


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_over_a_partly_filled_cache(
    lower: Any, batch: int, new: int, heads: tuple[int, int], dtype: str
) -> None:
    lowered = lower(attention(batch, new, heads, dtype), feeds(batch, new, heads, dtype))
    assert "Attention" not in lowered.ops
    # What reads the cache reads it as it lies: no copy of it is ever made.
    assert lowered.consumers("past_k") == {"MatMul"}
    assert lowered.consumers("past_v") == {"MatMul"}


@pytest.mark.parametrize("new", [1, 5])
def test_garbage_in_masked_slots_does_not_show(lower: Any, new: int) -> None:
    given = feeds(2, new, (4, 2))
    text = attention(2, new, (4, 2))
    clean = lower(text, given).found[0]
    for name in ("past_k", "past_v"):
        given[name][:, :, 4:] = 50.0
    np.testing.assert_array_equal(lower(text, given).found[0], clean)


@pytest.mark.parametrize("new", [1, 5])
def test_sliding_window(lower: Any, new: int) -> None:
    given = feeds(2, new, (4, 2))
    text = attention(2, new, (4, 2))
    whole = lower(text, given).found[0]
    given["mask"] = causal_mask(2, new, valid=4, window=2).astype(np.float32)
    assert np.abs(lower(text, given).found[0] - whole).max() > 1e-2


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_boolean_mask(lower: Any, new: int, heads: tuple[int, int]) -> None:
    given = feeds(2, new, heads)
    given["mask"] = given["mask"] == 0
    lowered = lower(attention(2, new, heads, mask=f"bool[2,1,{new},{CAPACITY + new}]"), given)
    assert "Where" in lowered.ops


@pytest.mark.parametrize("new", [1, 5])
def test_a_mask_for_each_head_follows_the_row_order(lower: Any, new: int) -> None:
    """Row g*S + s of a kv head: a mixed-up order would mask other tokens or heads."""
    given = feeds(2, new, (4, 2))
    rng = np.random.default_rng(7)
    given["mask"] = rng.choice([0.0, MASKED], (2, 4, new, CAPACITY + new)).astype(np.float32)
    given["mask"][..., 0] = 0
    lower(attention(2, new, (4, 2), mask=f"float[2,4,{new},{CAPACITY + new}]"), given)


@pytest.mark.parametrize("mask_type", ["float[5,11]", "float[1,5,11]", "float[1,1,5,11]"])
def test_masks_of_lower_rank_broadcast(lower: Any, mask_type: str) -> None:
    given = feeds(2, 5, (4, 2))
    shape = tuple(int(dim) for dim in mask_type[6:-1].split(","))
    rows = given["mask"][0, 0, : shape[-2]]
    given["mask"] = rows.reshape(shape)
    lower(attention(2, 5, (4, 2), mask=mask_type), given)


@pytest.mark.parametrize("new", [1, 5])
def test_causal_attribute(lower: Any, new: int) -> None:
    given = feeds(1, new, (4, 2))
    del given["mask"]
    lowered = lower(attention(1, new, (4, 2), mask="", attributes=", is_causal = 1"), given)
    # One new token sees every slot: no mask is added then.
    assert ("Add" in lowered.ops[: lowered.ops.index("Softmax")]) == (new > 1)


@pytest.mark.parametrize("attributes", [", scale = 0.5", ", softcap = 2.0", ""])
def test_scale_and_softcap(lower: Any, attributes: str) -> None:
    given = feeds(2, 3, (4, 2))
    given["q"] *= 4
    lowered = lower(attention(2, 3, (4, 2), attributes=attributes), given)
    assert ("Tanh" in lowered.ops) == ("softcap" in attributes)


def test_softmax_in_fp32_where_the_graph_asks_for_it(lower: Any) -> None:
    given = feeds(1, 3, (4, 2), "float16")
    plain = lower(attention(1, 3, (4, 2), "float16"), given)
    wide = lower(attention(1, 3, (4, 2), "float16", attributes=", softmax_precision = 1"), given)
    assert plain.ops.count("Cast") == 0
    assert wide.ops.count("Cast") == 2


def test_fp16_scores_do_not_overflow(lower: Any) -> None:
    """The raw product q.k is 64 * 40 * 40 = 102400 here; scaled first it is 12800."""
    heads = (2, 1)
    given = feeds(1, 2, heads, "float16", head=64)
    for name in ("q", "k", "past_k"):
        given[name] = np.full_like(given[name], 40)
    lowered = lower(attention(1, 2, heads, "float16", head=64), given)
    assert np.isfinite(lowered.found[0].astype(np.float32)).all()


def test_at_one_token_nothing_but_scores_and_queries_is_transposed(lower: Any) -> None:
    lowered = lower(attention(2, 1, (4, 2)), feeds(2, 1, (4, 2)))
    scores = ["Mul", "Reshape", "Transpose", "Reshape", "MatMul", "MatMul", "Concat", "Transpose"]
    values = ["Add", "Softmax", "Split", "Reshape", "MatMul", "MatMul", "Add", "Reshape"]
    assert sorted(lowered.ops) == sorted([*scores, *values])


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("causal", [0, 1])
def test_without_a_past(lower: Any, heads: tuple[int, int], causal: int) -> None:
    query, kv = heads
    given = feeds(2, 5, heads)
    text = f"""
        attend (float[2,5,{query * 8}] q, float[2,5,{kv * 8}] k, float[2,5,{kv * 8}] v)
            => (float[2,5,{query * 8}] y)
        {{ y = Attention <q_num_heads = {query}, kv_num_heads = {kv}, is_causal = {causal}>
                (q, k, v) }}
    """
    lower(text, {name: given[name] for name in "qkv"})


@pytest.mark.parametrize("new", [1, 3])
def test_four_dimensional_inputs(lower: Any, new: int) -> None:
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    given = {
        "q": numbers(2, 4, new, 8),
        "k": numbers(2, 2, new, 8),
        "v": numbers(2, 2, new, 6),
        "past_k": numbers(2, 2, 6, 8),
        "past_v": numbers(2, 2, 6, 6),
        "mask": causal_mask(2, new, 4, None).astype(np.float32),
    }
    text = f"""
        attend (float[2,4,{new},8] q, float[2,2,{new},8] k, float[2,2,{new},6] v,
                float[2,2,6,8] past_k, float[2,2,6,6] past_v, float[2,1,{new},{6 + new}] mask)
            => (float[2,4,{new},6] y)
        {{ y, present_k, present_v = Attention (q, k, v, mask, past_k, past_v) }}
    """
    lower(text, given)


def test_a_present_that_is_read_is_made(lower: Any) -> None:
    """Before fuse-kv-io a graph returns the whole cache; that copy is what the graph asks for."""
    given = feeds(1, 2, (4, 2))
    text = attention(1, 2, (4, 2)).replace(
        "y)\n", "y, float[1,2,8,8] present_k, float[1,2,8,8] present_v)\n"
    )
    lowered = lower(text, given)
    np.testing.assert_array_equal(lowered.found[1][:, :, :CAPACITY], given["past_k"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            """a (float[1,2,8] q, float[1,4,8] k, float[1,4,8] v, int64[1] n) => (float[1,2,8] y)
            { y = Attention <q_num_heads = 1, kv_num_heads = 1> (q, k, v, , , , n) }""",
            "nonpad_kv_seqlen",
        ),
        (
            """a (float[1,2,8] q, float[1,2,8] k, float[1,2,8] v)
                => (float[1,2,8] y, float[1,1,2,2] s)
            { y, , , s = Attention <q_num_heads = 1, kv_num_heads = 1> (q, k, v) }""",
            "qk_matmul_output",
        ),
        (
            """a (float[1,2,8] q, float[1,4,8] k, float[1,4,8] v, float[2,3] m) => (float[1,2,8] y)
            { y = Attention <q_num_heads = 1, kv_num_heads = 1> (q, k, v, m) }""",
            "the mask [2, 3] does not fit 2 queries and 4 keys",
        ),
    ],
)
def test_what_cannot_be_lowered_stays_and_says_why(
    text_to_model: Callable[[str], ir.Model], text: str, reason: str
) -> None:
    model = text_to_model(text)
    assert legalize(model, target("Ascend310P3")) == 0
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert reason in node.metadata_props[NOT_LEGALIZED]
    # Nothing that was recorded before the refusal is left behind.
    assert all(set(value.consumers()) <= set(model.graph) for value in model.graph.inputs)
    assert not model.graph.initializers


# --- attention sinks --------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_sink_makes_neither_keys_nor_masks_wider(
    lower: Any, batch: int, new: int, heads: tuple[int, int]
) -> None:
    text = attention(batch, new, heads)
    numbers = ", ".join(f"{i / 4 - 0.3:g}" for i in range(4))
    before, _, call = text.partition("{ y, present_k, present_v = Attention")
    text = f"""{before} <float[1, 4, 1, 1] sinks = {{{numbers}}}, int64[6] row = {{0,0,0,0,1,0}},
        int64[4] spread = {{1,4,1,1}}, int64[4] all = {{{batch},4,{new},1}}>
        {{ k1 = Pad (k, row) v1 = Pad (v, row) by_head = Expand (mask, spread)
           column = Expand (sinks, all) mask1 = Concat <axis = -1> (by_head, column)
           y, present_k, present_v = Attention {call.replace("(q, k, v, mask,", "(q, k1, v1, mask1,")}
    """
    lowered = lower(text, feeds(batch, new, heads))
    assert not {"Attention", "Pad"} & set(lowered.ops)
    assert lowered.consumers("past_k") == {"MatMul"}
    assert lowered.consumers("mask") == {"Add"}
