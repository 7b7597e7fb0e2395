"""Mixtures of experts in the canonical form, recognised by running what takes the rows."""

import pytest

from omforge.ir.infer import infer_model
from omforge.passes.ungroup_experts import UngroupExperts
from omforge.recognition.experts.block import find_blocks
from omforge.testing import parse
from tests.passes.test_ungroup_experts import TEXT

ONE_EACH = """<ir_version: 11, opset_import: ["" : 24]>
g (float[n, 2] x, int64[n] choices) => (float[n, 2] y)
<float[3, 2, 2] w = {1,2,3,4,5,6,7,8,9,8,7,6}, int64[2] flat = {-1, 2}, int64 zero = {0},
 int64 one = {1}> {
    all = MatMul (x, w)
    rows = Reshape (all, flat)
    INDEX
    y = Gather <axis = 0> (rows, index)
}"""
INDEX = """shape = Shape <end = 1> (x)
    tokens = Squeeze (shape)
    token = Range (zero, tokens, one)
    before = Mul (choices, tokens)
    index = Add (before, token)"""


def test_what_the_raising_pass_writes_is_one() -> None:
    model = parse(TEXT)
    UngroupExperts().run(model)
    infer_model(model)
    (block,) = find_blocks(model)
    assert block.choices.name == "chosen"
    assert (block.experts, block.each, str(block.tokens)) == (3, 2, "n")
    assert len(block.products) == 2


def test_an_index_of_choices_and_tokens_is_one() -> None:
    model = parse(ONE_EACH.replace("INDEX", INDEX))
    infer_model(model)
    (block,) = find_blocks(model)
    assert block.choices.name == "choices"
    assert (block.experts, block.each) == (3, 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Add (before, token)", "Sub (before, token)"),
        ("Range (zero, tokens, one)", "Range (one, more, one)"),
        ("index = Add (before, token)", "index = Identity (before)"),
    ],
)
def test_another_index_is_none(old: str, new: str) -> None:
    text = ONE_EACH.replace("INDEX", INDEX)
    assert old in text
    text = text.replace(old, new).replace(
        "token = Range", "more = Add (tokens, one)\n    token = Range"
    )
    model = parse(text)
    infer_model(model)
    assert not find_blocks(model)
