"""Attention by fused operators, against ONNX Runtime's own Attention: asked for, never by default."""

from typing import Any

import numpy as np
import pytest

from omforge import ir
from omforge.ir.numerics import TOLERANCES, within
from omforge.ir.ops import reference_model
from omforge.lowering.legality import check_legal
from omforge.lowering.legalize import Decision, legalize
from omforge.lowering.target import target
from tests.lowering.legalize.conftest import parse, run

NUMPY = {"float": np.float32, "float16": np.float16}
BATCH, NEW, CAPACITY, HEAD = 2, 32, 64, 16
SOFTMAX, FLASH = "NPUScaledMaskedSoftmax", "NPUPromptFlashAttention"


def text(heads: tuple[int, int], dtype: str, *, new: int = NEW, more: str = "") -> str:
    query, kv = heads
    cache = f"{dtype}[{BATCH},{kv},{CAPACITY},{HEAD}]"
    return f"""
        attend ({dtype}[{BATCH},{new},{query * HEAD}] q, {dtype}[{BATCH},{new},{kv * HEAD}] k,
                {dtype}[{BATCH},{new},{kv * HEAD}] v, {cache} past_k, {cache} past_v,
                {dtype}[{BATCH},1,{new},{CAPACITY + new}] attention_mask)
            => ({dtype}[{BATCH},{new},{query * HEAD}] y)
        {{ y, present_k, present_v = Attention
                <q_num_heads = {query}, kv_num_heads = {kv} {more}>
                (q, k, v, attention_mask, past_k, past_v) }}
    """


def feeds(heads: tuple[int, int], dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(heads[1])
    query, kv = heads
    mask = np.triu(np.full((NEW, CAPACITY + NEW), -30000.0), CAPACITY + 1)
    mask[:, 40:CAPACITY] = -30000
    shapes = {
        "q": (BATCH, NEW, query * HEAD),
        "k": (BATCH, NEW, kv * HEAD),
        "v": (BATCH, NEW, kv * HEAD),
        "past_k": (BATCH, kv, CAPACITY, HEAD),
        "past_v": (BATCH, kv, CAPACITY, HEAD),
    }
    made = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    made["attention_mask"] = np.broadcast_to(mask, (BATCH, 1, *mask.shape))
    return {name: array.astype(NUMPY[dtype]) for name, array in made.items()}


def lowered(
    model: ir.Model, form: str, soc: str, gears: dict[str, tuple[int, ...]] | None = None
) -> Decision:
    told: list[Decision] = []
    legalize(model, target(soc), gears=gears, forms={"Attention": form}, told=told)
    return told[0]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize(
    ("form", "soc", "dtype"),
    [
        (SOFTMAX, "Ascend310P3", "float"),
        (SOFTMAX, "Ascend310P3", "float16"),
        (SOFTMAX, "Ascend910B4", "float16"),
        (FLASH, "Ascend910B4", "float16"),
    ],
)
def test_gives_the_numbers_of_attention(
    form: str, soc: str, dtype: str, heads: tuple[int, int]
) -> None:
    model = parse(text(heads, dtype))
    given = feeds(heads, dtype)
    (expected,) = run(model, given)
    assert lowered(model, form, soc).form == form
    assert form in {node.op_type for node in model.graph}
    assert check_legal(model, target(soc)) == []
    (found,) = run(reference_model(model), given)
    assert found.dtype == expected.dtype
    assert within(found, expected, TOLERANCES[str(expected.dtype)])


def refusal(model: ir.Model, form: str, soc: str = "Ascend910B4") -> str:
    decision = lowered(model, form, soc)
    assert decision.form == "MatMul-Softmax"
    return next(refused.reason for refused in decision.refused if refused.form == form)


@pytest.mark.parametrize(
    ("form", "dtype", "changes", "reason"),
    [
        (SOFTMAX, "float16", {"new": 1}, "S = 1 and C + S = 65 must be multiples of 32"),
        (SOFTMAX, "float16", {"more": ", softcap = 30.0"}, "softcap comes between"),
        (SOFTMAX, "float16", {"more": ", softmax_precision = 1"}, "a softmax in float32"),
        (FLASH, "float", {}, "float16 and bfloat16 only"),
        (FLASH, "float16", {"new": 1}, "one token"),
        (FLASH, "float16", {"more": ", softcap = 30.0"}, "no softcap"),
    ],
)
def test_refuses_what_it_cannot_do(
    form: str, dtype: str, changes: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(parse(text((4, 2), dtype, **changes)), form)


def test_prompt_flash_attention_is_out_of_reach_on_310p() -> None:
    assert refusal(parse(text((4, 2), "float16")), FLASH, "Ascend310P3") == "310p does not have it"


@pytest.mark.parametrize("form", [SOFTMAX, FLASH])
def test_a_mask_that_is_computed_may_hold_biases(form: str) -> None:
    source = text((4, 2), "float16").replace("(q, k, v, attention_mask,", "(q, k, v, biased,")
    source = source.replace("{ y, present_k", "{ biased = Neg (attention_mask)  y, present_k")
    assert "may hold biases" in refusal(parse(source), form)


def test_neither_is_chosen_without_asking() -> None:
    model = parse(text((4, 2), "float16"))
    told: list[Decision] = []
    legalize(model, target("Ascend910B4"), told=told)
    assert told[0].form == "MatMul-Softmax"
    asked = {r.form: r.reason for r in told[0].refused if r.reason.startswith("not asked for")}
    assert set(asked) == {SOFTMAX, FLASH}


def test_the_flash_form_pays_for_a_copy_of_the_cache_that_the_default_does_not() -> None:
    told: list[Decision] = []
    legalize(parse(text((4, 2), "float16")), target("Ascend910B4"), told=told)
    joined = 2 * BATCH * 2 * (CAPACITY + NEW) * HEAD * 2
    flash = next(refused for refused in told[0].refused if refused.form == FLASH)
    assert flash.traffic[0].written >= joined
