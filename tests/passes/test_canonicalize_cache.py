"""canonicalize-cache: [B, K, P, D] for every layer, however the export lays its cache out."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.passes import make_pipeline
from omforge.passes.canonicalize_cache import CanonicalizeCache
from omforge.recognition.cache.exported import exported_caches
from omforge.rewriting.events import events
from omforge.testing import parse
from tests.passes.blocks import Block, assert_same_for_all_steps, ops, steps
from tests.passes.cache_layouts import ROWS, in_one_tensor, laid_out, slices, stacked, transposed

LAYOUTS = [
    ("P B K D", "P B K D"),  # ChatGLM
    ("B P K D", "B P K D"),  # Qwen-1
    ("B K D P", "B K P D"),  # keys ready for their product
    ("K B P D", "K B P D"),
    ("BK D P", "BK P D"),  # BLOOM
    ("BK P D", "BK P D"),
    ("B P KD", "B P KD"),
    ("1 B K P D", "1 B K P D"),
]


def canonical(text: str) -> ir.Model:
    model = parse(text)
    make_pipeline("name-dims,fold-constants,remove-no-ops,canonicalize-cache").run(model)
    return model


def shapes(values: list[ir.Value]) -> dict[str, str]:
    return {str(v.name): str(v.shape) for v in values}


@pytest.mark.parametrize(("keys", "values"), LAYOUTS)
def test_every_layout_becomes_one(keys: str, values: str) -> None:
    model = canonical(laid_out(keys, values))
    assert [e for e in events(model) if e.pass_name == CanonicalizeCache.name] == []
    found = shapes([*model.graph.inputs, *model.graph.outputs])
    assert found["past_key"] == found["past_value"] == "[batch,2,past,4]"
    assert found["present_key"] == found["present_value"] == "[batch,2,past + seq,4]"
    # What the export had is known to whoever runs it.
    kept = {cache.input: cache for cache in exported_caches(model)}
    sizes = {"B": "batch", "K": 2, "P": "past", "D": 4, "BK": "2*batch", "KD": 8, "1": 1}
    assert kept["past_key"].shape == tuple(sizes[letters] for letters in keys.split())
    assert kept["past_key"].axis == keys.split().index("P")
    # And the numbers, and what is raised, are those of a cache that was canonical all along.
    assert_same_for_all_steps(parse(Block().text()), model, Block())
    make_pipeline("raise").run(model)
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert [v.name for v in attention.inputs[4:6] if v] == ["past_key", "past_value"]
    assert_same_for_all_steps(parse(Block().text()), model, Block(), padding_rows=False)


def test_a_canonical_cache_is_left_alone() -> None:
    model = parse(Block().text())
    make_pipeline("name-dims").run(model)
    before = ir.to_text(model)
    assert CanonicalizeCache().run(model) == 0
    assert ir.to_text(model) == before
    assert exported_caches(model) == ()


def test_casts_at_the_border_are_taken_off() -> None:
    model = canonical(laid_out("B K P D", "B K P D", dtype="float16"))
    assert {v.name: v.dtype for v in model.graph.inputs}["past_key"] == ir.DataType.FLOAT
    assert "Cast" not in {n.op_type for v in model.graph.inputs[3:] for n in v.consumers()}
    assert_same_for_all_steps(parse(Block().text()), model, Block())


ONE_TENSOR = {
    "rows behind heads": (
        in_one_tensor("batch, past, 4, 4", transposed(slices(2)), ROWS.format("k4", "v4"), 1),
        ("rows", 1),
    ),
    "all behind heads": (
        in_one_tensor(
            "batch, past, 4, 4",
            transposed(slices(2)),
            ROWS.format("present_key", "present_value"),
            1,
        ),
        ("whole", 1),
    ),
    "an axis for keys and values": (
        in_one_tensor("2, batch, 2, past, 4", slices(0, squeeze=True), stacked(0), 3),
        ("whole", 3),
    ),
    "the same behind the batch": (
        in_one_tensor("batch, 2, 2, past, 4", slices(1, squeeze=True), stacked(1), 3),
        ("whole", 3),
    ),
}


@pytest.mark.parametrize("case", ONE_TENSOR)
def test_one_tensor_of_all_layers_is_taken_apart(case: str) -> None:
    text, returned = ONE_TENSOR[case]
    model = canonical(text)
    found = shapes([*model.graph.inputs, *model.graph.outputs])
    assert list(found)[-3:] == ["logits", "present.0.key", "present.0.value"]
    assert found["past_key_values.0.key"] == "[batch,2,past,4]"
    assert found["present.0.value"] == "[batch,2,past + seq,4]"
    (kept,) = exported_caches(model)
    assert (kept.input, kept.output) == ("cache", "renewed")
    assert (kept.returns, kept.axis) == returned
    assert kept.serves == ("past_key_values.0.key", "past_key_values.0.value")
    make_pipeline("raise").run(model)
    assert ops(model).count("Attention") == 1
    plain = parse(Block().text())
    for feeds in steps(Block()):
        renamed = {
            {"past_key": "past_key_values.0.key", "past_value": "past_key_values.0.value"}.get(
                name, name
            ): array
            for name, array in feeds.items()
        }
        expected, got = numerics.run(plain, feeds), numerics.run(model, renamed)
        real = feeds["attention_mask"][:, -feeds["input_ids"].shape[1] :] != 0
        np.testing.assert_allclose(
            got["logits"][real], expected["logits"][real], rtol=1e-4, atol=1e-5
        )


MISSES = {
    "no output gives back": (
        "renewed = Concat <axis = 1> (uk, uv)",
        "renewed = Concat <axis = 1> (uv, uk)",
    ),
    "reads it otherwise": (
        "logits = MatMul (hidden, head)",
        "raw = MatMul (hidden, head) most = ReduceMax <keepdims = 0> (cache)"
        " logits = Add (raw, most)",
    ),
}


@pytest.mark.parametrize("why", MISSES)
def test_what_the_next_step_would_not_find_is_left_alone(why: str) -> None:
    text, _ = ONE_TENSOR["the same behind the batch"]
    old, new = MISSES[why]
    assert old in text
    model = parse(text.replace(old, new))
    make_pipeline("name-dims,fold-constants").run(model)
    before = ir.to_text(model)
    assert CanonicalizeCache().run(model) == 0
    assert ir.to_text(model) == before
    (event,) = (e for e in events(model) if e.pass_name == CanonicalizeCache.name)
    assert why in event.reason


def test_a_cache_that_no_product_reads_is_left_alone() -> None:
    text = laid_out("P B K D", "B K P D").replace("whole_key = Transpose", "kept = Transpose")
    text = text.replace("(key_parts)", "(key_parts) whole_key = Neg (kept)")
    model = parse(text)
    make_pipeline("name-dims,fold-constants").run(model)
    assert CanonicalizeCache().run(model) == 1  # the values
    (event,) = (e for e in events(model) if e.pass_name == CanonicalizeCache.name)
    assert "past_key" in event.where
    assert "no product of attention tells" in event.reason
