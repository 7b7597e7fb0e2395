"""text-positions: M-RoPE's positions of time, height and width, taken as one for text."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.bundle.manifest import Export, KvCache
from omforge.compilation.compare_feeds import make_feeds
from omforge.ir.numerics import run, tolerance, within
from omforge.passes.fuse_rotary import FuseRotary
from omforge.passes.text_positions import TextPositions
from omforge.recognition.interface import find_interface
from omforge.rewriting.events import events
from omforge.runtime.export import ExportModel
from omforge.testing import parse
from tests.passes.blocks import Block, named

# Pairs 0 and 1 turn by time, 2 and 3 by height; positions are given from outside, or once for both.
_SECTIONS = (
    ("position_u = Unsqueeze (position, i_2)", "position_u = Unsqueeze (position, i_3)"),
    *(
        (
            f"{name}_b = Concat <axis = -1> ({name}_a, {name}_a)",
            f"{name}_0 = Gather <axis = 0> ({name}_a, s_0) {name}_1 = Gather <axis = 0> ({name}_a,"
            f" s_1) {name}_t = Slice ({name}_0, i_0, i_2, i_2) {name}_h = Slice ({name}_1, i_2,"
            f" i_4, i_2) {name}_b = Concat <axis = -1> ({name}_t, {name}_h, {name}_t, {name}_h)",
        )
        for name in ("cos", "sin")
    ),
    ("float[4] inv_freq", "int64 s_0 = {0}, int64 s_1 = {1}, float[4] inv_freq"),
)
_OUTSIDE = ("int64[batch, seq] position_ids", "int64[3, batch, seq] position_ids")
_INSIDE = (
    ("position = Cast <to = 1> (position_ids)", "three = Unsqueeze (position_ids, i_0)"
     " each = Expand (three, i_3_1_1) position = Cast <to = 1> (each)"),
    ("int64 s_0", "int64[3] i_3_1_1 = {3, 1, 1}, int64 s_0"),
)  # fmt: skip
BLOCK = Block(rotary="half", size=8, visible="", padding=False)


def _block(*edits: tuple[str, str]) -> Block:
    return dataclasses.replace(BLOCK, edits=(*_SECTIONS, *edits))


def _rotations(model: ir.Model) -> int:
    return sum(node.op_type == "RotaryEmbedding" for node in model.graph)


def test_positions_that_are_given_once_for_all_are_an_ordinary_rotation() -> None:
    before, model = named(_block(*_INSIDE)), named(_block(*_INSIDE))
    assert FuseRotary().run(model) == 2
    assert _rotations(model) == 2
    assert not [event for event in events(model) if "kept as it stands" in event.reason]
    for feeds in make_feeds(model):
        expected, got = run(before, feeds), run(model, feeds)
        assert all(within(got[k], v, tolerance("float32")) for k, v in expected.items())


def test_three_rows_become_one() -> None:
    before, model = named(_block(_OUTSIDE)), named(_block(_OUTSIDE))
    assert TextPositions().run(model) == 1
    assert TextPositions().run(model) == 0
    positions = find_interface(model).position_ids
    assert positions is not None
    assert positions.name == "position_ids"
    assert any("an image's are not" in event.reason for event in events(model))
    assert FuseRotary().run(model) == 2
    for feeds in make_feeds(model):
        three = {**feeds, "position_ids": np.stack([feeds["position_ids"]] * 3)}
        expected, got = run(before, three), run(model, feeds)
        assert all(within(got[k], v, tolerance("float32")) for k, v in expected.items())


def test_raised_alone_rows_that_differ_stay_right() -> None:
    before, model = named(_block(_OUTSIDE)), named(_block(_OUTSIDE))
    assert FuseRotary().run(model) == 2
    assert any("kept as it stands" in event.reason for event in events(model))
    feeds = make_feeds(model)[1]
    assert feeds["position_ids"].ndim == 3
    feeds["position_ids"] = feeds["position_ids"] + np.array([0, 5, 9])[:, None, None]
    expected, got = run(before, feeds), run(model, feeds)
    assert all(within(got[k], v, tolerance("float32")) for k, v in expected.items())


def test_a_model_of_one_position_for_each_token_stays() -> None:
    model = named(BLOCK)
    assert TextPositions().run(model) == 0
    assert not events(model)


@pytest.mark.parametrize("rows", [3, 4])
def test_the_export_is_fed_as_many_rows_as_it_takes(tmp_path: Path, rows: int) -> None:
    outside = (_OUTSIDE[0], _OUTSIDE[1].replace("3", str(rows)))
    path = tmp_path / "model.onnx"
    ir.save(parse(_block(outside).text()), path)
    export = Export(
        path=str(path), sha256="", input_ids="input_ids", attention_mask=None,
        position_ids="position_ids", past=(("past_key", "past_value"),),
        present=(("present_key", "present_value"),), logits="logits", extra=(), dtype="float32",
    )  # fmt: skip
    with ExportModel(path, export, KvCache("per-layer", 1, 2, 8, 8, 32, "float32")) as exported:
        exported.prefill([[3, 5, 7]])
        step = exported.decode([9])
        np.testing.assert_allclose(exported.prefill([[3, 5, 7, 9]]), step, rtol=1e-4, atol=1e-4)
