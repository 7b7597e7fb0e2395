"""one-hot-choices: what is scattered to a TopK's choices is a sum of one-hot rows."""

import pytest

from omforge.passes.one_hot_choices import OneHotChoices
from omforge.testing import assert_leaves_alone, assert_rewrites

BEFORE = """<ir_version: 11, opset_import: ["" : 24]>
g (float[n, 4] scores) => (float[n, 4] y)
<int64[1] k = {2}> {
    best, choices = TopK (scores, k)
    shares = Softmax (best)
    shape = Shape (scores)
    zeros = ConstantOfShape (shape)
    y = ScatterElements <axis = 1> (zeros, choices, shares)
}"""


def test_shares_go_to_the_chosen_experts() -> None:
    assert_rewrites(
        OneHotChoices(),
        BEFORE,
        """<ir_version: 11, opset_import: ["" : 24]>
        g (float[n, 4] scores) => (float[n, 4] y)
        <int64[1] k = {2}, float[2] values = {0, 1}, int64 depth = {4}, int64[1] last = {-1},
         int64[1] slots = {-2}> {
            best, choices = TopK (scores, k)
            shares = Softmax (best)
            rows = OneHot <axis = -1> (choices, depth, values)
            columns = Unsqueeze (shares, last)
            parts = Mul (rows, columns)
            y = ReduceSum <keepdims = 0> (parts, slots)
        }""",
    )


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("<axis = 1>", "<axis = 0>", "does not scatter along a last axis"),
        ("ConstantOfShape (shape)", "ConstantOfShape <value = float {1}> (shape)", "no zero"),
        ("<axis = 1>", '<axis = 1, reduction = "max">', "reduces with max"),
        ("(zeros, choices, shares)", "(zeros, places, shares)", "one place may be taken twice"),
    ],
)
def test_other_scatters_stay(
    old: str, new: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = BEFORE.replace(old, new).replace(
        "shape = Shape", "places = Identity (choices)\n shape = Shape"
    )
    assert_leaves_alone(OneHotChoices(), model, reason, caplog)
