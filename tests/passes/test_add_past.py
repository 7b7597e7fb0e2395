"""add-past: a decoder that reads whole texts goes on from a past as one that was exported with it."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.passes import make_pipeline
from omforge.passes.add_past import AddPast
from omforge.testing import parse
from tests.passes.blocks import Block, ops, steps

BLOCKS = {
    "positions given": {"rotary": "half"},
    "positions counted from the mask": {
        "rotary": "half",
        "edits": (
            (
                "position = Cast <to = 1> (position_ids)",
                "one_axis = Constant <value_int = 1> () all = CumSum (attention_mask, one_axis)"
                " less = Sub (all, one_axis) none = Constant <value_int = 0> ()"
                " counted = Max (less, none) position = Cast <to = 1> (counted)",
            ),
        ),
    },
    "a window": {"visible": "window", "rotary": "half"},
    "rows of zeros": {"guard": "nan", "low": -np.inf},
    "tables": {"rotary": "interleaved", "tables": "gathered"},
}


def raised(block: Block) -> ir.Model:
    model = parse(block.text())
    make_pipeline("raise").run(model)
    return model


@pytest.mark.parametrize("name", BLOCKS)
def test_it_gives_what_an_export_with_a_past_gives(name: str) -> None:
    options = dict(BLOCKS[name])
    model = raised(Block(cache=False, **options))  # type: ignore[arg-type]
    assert AddPast().run(model) == 1
    ir.check(model)
    assert ops(model).count("Attention") == 1
    options.pop("edits", None)
    whole = Block(**options)  # type: ignore[arg-type]
    cached = raised(whole)
    caches = {"past_key": "past_key_values.0.key", "past_value": "past_key_values.0.value"}
    inputs = {value.name for value in model.graph.inputs}
    for feeds in steps(whole):
        renamed = {caches.get(n, n): array for n, array in feeds.items()}
        expected = numerics.run(cached, feeds)
        got = numerics.run(model, {n: array for n, array in renamed.items() if n in inputs})
        real = np.ones(feeds["input_ids"].shape, bool)
        if "attention_mask" in feeds:  # what padding gives nobody reads
            real = feeds["attention_mask"][:, -real.shape[1] :] != 0
        np.testing.assert_allclose(
            got["logits"][real], expected["logits"][real], rtol=1e-4, atol=1e-5
        )
        for role in ("key", "value"):
            key = got[f"present.0.{role}"].transpose(0, 2, 1, 3)[:, -real.shape[1] :][real]
            known = expected[f"present_{role}"].transpose(0, 2, 1, 3)[:, -real.shape[1] :][real]
            np.testing.assert_allclose(key, known, rtol=1e-4, atol=1e-5)


def test_a_model_with_a_past_is_left_alone() -> None:
    model = raised(Block())
    before = ir.to_text(model)
    assert AddPast().run(model) == 0
    assert ir.to_text(model) == before


REFUSED = {
    "sees later tokens": Block(cache=False, visible="all"),
    "CumSum .*mixes tokens": Block(
        cache=False,
        edits=(
            (
                "x = Gather (table, input_ids)",
                "e = Gather (table, input_ids) along = Constant <value_int = 1> ()"
                " x = CumSum (e, along)",
            ),
        ),
    ),
    "Slice .*mixes tokens": Block(
        cache=False,
        edits=(
            (
                "x = Gather (table, input_ids)",
                "e = Gather (table, input_ids) from = Constant <value_ints = [1]> ()"
                " to = Constant <value_ints = [9999]> () along = Constant <value_ints = [1]> ()"
                " zero1 = Constant <value_ints = [0]> () last = Slice (e, from, to, along)"
                " first = Slice (e, zero1, from, along) x = Concat <axis = 1> (last, first)",
            ),
        ),
    ),
    "counts tokens from the first": Block(
        cache=False,
        edits=(
            (
                "x = Gather (table, input_ids)",
                "e = Gather (table, input_ids) from = Constant <value_ints = [0]> ()"
                " p = Slice (table, from, seq1, from) x = Add (e, p)",
            ),
        ),
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_would_need_more_than_keys_and_values_is_refused(why: str) -> None:
    model = raised(REFUSED[why])
    with pytest.raises(ir.CheckError, match=why):
        AddPast().run(model)
