"""tabulate-rotary: cos and sin become rows of a table, the same to the bit."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.ir.values import constant
from omforge.passes import make_pipeline
from omforge.passes.fuse_rotary import FuseRotary
from omforge.passes.tabulate_rotary import TabulateRotary
from omforge.rewriting.events import events
from tests.passes.blocks import Block, assert_same_for_all_steps, named, ops

ROTARY = Block(rotary="half", size=8, visible="", padding=False)


def rotated(block: Block = ROTARY, changes: dict[str, str] | None = None) -> ir.Model:
    """A model whose rotary embeddings are raised."""
    model = named(dataclasses.replace(block, edits=tuple((changes or {}).items())))
    assert FuseRotary().run(model) == 2
    model.meta.clear()  # what fuse-rotary told
    return model


def tables(model: ir.Model) -> list[np.ndarray]:
    """The tables that the first embedding looks rows of cos and sin up in."""
    node = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    found: list[np.ndarray] = []
    for value in node.inputs[1:3]:
        assert value is not None
        lookup = value.producer()
        assert lookup is not None
        assert lookup.op_type == "Gather"
        assert lookup.inputs[1] is not None
        assert lookup.inputs[1].name == "position_ids"
        array = constant(lookup.inputs[0])
        assert array is not None
        found.append(array)
    return found


@pytest.mark.parametrize("rotary", ["half", "interleaved"])
@pytest.mark.parametrize("computed", ["computed", "gathered"])
def test_keeps_the_numbers(rotary: str, computed: str) -> None:
    block = dataclasses.replace(ROTARY, rotary=rotary, tables=computed)
    original, model = rotated(block), rotated(block)
    assert TabulateRotary(32).run(model) == 2
    ir.check(model)
    assert "Cos" not in ops(model)
    assert_same_for_all_steps(original, model, block)
    assert not events(model)


def test_a_table_is_the_formula_to_the_bit() -> None:
    """ONNX Runtime's cosine of a product in float32: what the model itself would compute."""
    model = rotated()
    TabulateRotary(300).run(model)
    cos, sin = tables(model)
    inv_freq = (100.0 ** (-np.arange(4) / 4)).astype(np.float32)
    formula = ir.from_onnx_text(
        """<ir_version: 11, opset_import: ["" : 24]>
        g (float[P, 1] position, float[4] inv_freq) => (float[P, 4] cos, float[P, 4] sin) {
            angle = Mul (position, inv_freq) cos = Cos (angle) sin = Sin (angle)
        }"""
    )
    positions = np.arange(300, dtype=np.float32)[:, None]
    exact = numerics.run(formula, {"position": positions, "inv_freq": inv_freq})
    np.testing.assert_array_equal(cos, exact["cos"])
    np.testing.assert_array_equal(sin, exact["sin"])
    np.testing.assert_allclose(cos, np.cos(positions * inv_freq), rtol=0, atol=2e-7)


def test_queries_and_keys_share_two_tables() -> None:
    model = rotated()
    assert TabulateRotary(32).run(model) == 2
    assert ops(model).count("Gather") == 3  # tokens, cos, sin


def test_finds_nothing_in_a_second_run() -> None:
    model = rotated()
    TabulateRotary(32).run(model)
    assert TabulateRotary(32).run(model) == 0


def test_leaves_a_model_without_rotary_embeddings_alone() -> None:
    assert TabulateRotary(32).run(named(Block())) == 0


def test_a_table_that_depends_on_the_length_is_an_event() -> None:
    """As LongRoPE's: beyond a length all positions turn at other frequencies."""
    changes = {
        "angle = Mul (position_u, inv_freq)": (
            "most = ReduceMax <keepdims = 0> (position) long = Greater (most, limit)"
            " slow = Mul (inv_freq, slower) chosen = Where (long, slow, inv_freq)"
            " angle = Mul (position_u, chosen)"
        ),
        "float[4] inv_freq": "float limit = {99.0}, float slower = {0.25}, float[4] inv_freq",
    }
    model = rotated(changes=changes)
    assert TabulateRotary(200).run(model) == 0
    assert "it depends on more than the token's own position" in events(model)[0].reason
    # As long as no sequence is longer than the limit, the position alone decides.
    short = rotated(changes=changes)
    assert TabulateRotary(99).run(short) == 2


def test_positions_that_are_no_input_are_an_event() -> None:
    changes = {
        "position = Cast <to = 1> (position_ids)": (
            "places = Range (past0, total0, n_1) row = Unsqueeze (places, i_0)"
            " position = Cast <to = 1> (row)"
        ),
        "float[4] inv_freq": "int64 n_1 = {1}, float[4] inv_freq",
    }
    model = rotated(dataclasses.replace(ROTARY, positions=False), changes)
    assert TabulateRotary(32).run(model) == 0
    assert "the model has no position_ids" in events(model)[0].reason


def test_refuses_a_table_of_nothing() -> None:
    with pytest.raises(ir.InputError, match="rotary tables of 0 positions"):
        TabulateRotary(0).run(rotated())


def test_tabulates_a_real_export(exported: Callable[[str, str], Path]) -> None:
    model = ir.load(exported("optimum", "llama_gqa"))
    make_pipeline("raise,tabulate-rotary{positions=64}").run(model)
    assert [table.shape for table in tables(model)] == [(64, 8), (64, 8)]
    assert not {"Cos", "Sin"} & set(ops(model))


COUNTED = dataclasses.replace(ROTARY, cache=False, positions=False)
COUNTS = {
    "position = Cast <to = 1> (position_ids)": (
        "slots = Range (zero_i, total0, one_i) row = Unsqueeze (slots, i_0)"
        " position = Cast <to = 1> (row)"
    ),
    "int64[1] i_0 ": "int64 zero_i = {0}, int64 one_i = {1}, int64[1] i_0 ",
}


def test_slots_that_a_model_counts_are_the_first_rows() -> None:
    """Without a cache the position is the slot: nobody has to feed it."""
    block = COUNTED
    model = rotated(block, COUNTS)
    before = model.clone()
    assert TabulateRotary(positions=40).run(model) == 2
    assert not events(model)
    assert not {"Cos", "Sin"} & set(ops(model))
    for batch, seq in ((1, 1), (2, 7), (1, 40)):
        tokens = np.random.default_rng(0).integers(0, 16, (batch, seq))
        expected = numerics.run(before, {"input_ids": tokens})["logits"]
        assert np.array_equal(numerics.run(model, {"input_ids": tokens})["logits"], expected)
