"""take-choices: a sum over all experts under scattered scores becomes one over a token's own."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.numerics import run, tolerance, within
from omforge.ir.verify import check
from omforge.passes.take_choices import TakeChoices
from omforge.recognition.experts.block import find_blocks
from omforge.rewriting.events import events
from omforge.testing import parse

# Three experts of which a token chooses two; the sum is in the shape of the batch.
TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[b, s, 2] x, float[n, 3] scores) => (float[b, s, 2] y)
<int64[1] k = {2}, int64[2] flat = {-1, 2}, int64[1] first = {0}, int64[1] last = {-1},
 int64[1] three = {3}, int64[1] rest = {-1}, int64[1] width = {2}, int64[3] tiled = {3, -1, 2},
 int64[2] times = {3, 1}, float[3, 2, 2] w = {1,2,3,4,5,6,7,8,9,8,7,6},
 float[3, 2, 2] v = {1,-2,3,-4,5,-6,7,-8,9,-8,7,-6}> {
    best, chosen = TopK (scores, k)
    share = Softmax <axis = 1> (best)
    size = Shape (scores)
    nothing = ConstantOfShape (size)
    spread = ScatterElements <axis = 1> (nothing, chosen, share)
    rows = Reshape (x, flat)
    copies = Tile (rows, times)
    apart = Reshape (copies, tiled)
    up = MatMul (apart, w)
    act = Swish (up)
    down = MatMul (act, v)
    batch = Shape <start = 0, end = 1> (x)
    whole = Concat <axis = 0> (three, batch, rest, width)
    shown = Reshape (down, whole)
    turned = Transpose <perm = [1, 0]> (spread)
    places = Concat <axis = 0> (three, batch, rest)
    weights = Reshape (turned, places)
    column = Unsqueeze (weights, last)
    weighed = Mul (shown, column)
    y = ReduceSum <keepdims = 0> (weighed, first)
}"""


def _feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch)
    scores = random.standard_normal((batch * length, 3)).astype(np.float32)
    scores[0] = 0.5  # a tie
    return {"x": random.standard_normal((batch, length, 2)).astype(np.float32), "scores": scores}


def static(batch: int, length: int, text: str = TEXT) -> ir.Model:
    shaped = text.replace("float[b, s, 2]", f"float[{batch}, {length}, 2]")
    return parse(shaped.replace("float[n, 3]", f"float[{batch * length}, 3]"))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 1), (1, 5), (2, 3)])
def test_the_numbers_stay_and_the_choice_is_stated(batch: int, length: int) -> None:
    before, model = static(batch, length), static(batch, length)
    assert TakeChoices().run(model) == 1
    check(model)
    infer_model(model)
    (block,) = find_blocks(model)
    assert (block.experts, block.each, block.tokens) == (3, 2, batch * length)
    assert "ScatterElements" not in {node.op_type for node in model.graph}
    feeds = _feeds(batch, length)
    expected, got = run(before, feeds), run(model, feeds)
    assert within(got["y"], expected["y"], tolerance("float32"))
    assert TakeChoices().run(model) == 0


def test_an_expert_that_overflows_does_not_matter_to_who_did_not_choose_it() -> None:
    model = static(1, 5, TEXT.replace("float[3, 2, 2] v = {1,", "float[3, 2, 2] v = {inf,"))
    TakeChoices().run(model)
    feeds = _feeds(1, 5)
    feeds["scores"][:, 0] = -9
    assert np.isfinite(run(model, feeds)["y"]).all()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("(weighed, first)", "(weighed, last)", "not over the experts"),
        ("Transpose <perm = [1, 0]> (spread)", "Reshape (spread, turn)", "of their expert"),
        ("float[3, 2, 2] v", "float[2, 2] v", "stacked weights makes the rows"),
        ("ScatterElements <axis = 1> (n", "ScatterElements <axis = 0> (n", "along a last axis"),
        ("ConstantOfShape (size)", "Expand (half, size)", "what is no zero"),
    ],
)
def test_near_misses_stay(old: str, new: str, reason: str) -> None:
    assert old in TEXT
    text = TEXT.replace(old, new).replace(
        "int64[1] k = {2}", "int64[1] k = {2}, int64[2] turn = {3, -1}, float half = {0.5}"
    )
    text = text.replace(
        "float[2, 2] v = {1,-2,3,-4,5,-6,7,-8,9,-8,7,-6}", "float[2, 2] v = {1,2,3,4}"
    )
    model = static(2, 3, text)
    assert TakeChoices().run(model) == 0
    assert any(reason in event.reason for event in events(model)), [e.reason for e in events(model)]
