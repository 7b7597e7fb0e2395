"""Weights that a router scatters to the places of its choices."""

import pytest

from omforge.ir.infer import infer_model
from omforge.recognition.experts.scattered import Scattered
from omforge.rewriting.match import NoMatch
from omforge.testing import parse

TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[n, 4] x, float[n, 4] other) => (float[n, 4] y)
<int64[1] k = {2}> {
    best, ids = TopK (x, k)
    size = Shape (x)
    nothing = ConstantOfShape (size)
    y = ScatterElements <axis = 1> (nothing, ids, best)
}"""


def _scattered(text: str) -> Scattered:
    model = parse(text)
    infer_model(model)
    return Scattered.of(next(n for n in model.graph if n.op_type == "ScatterElements"))


def test_what_a_router_scatters() -> None:
    found = _scattered(TEXT)
    assert (found.choices.name, found.updates.name) == ("ids", "best")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("(nothing, ids", "(other, ids", "what is no zero"),
        ("<axis = 1>", "<axis = 0>", "along a last axis"),
        ("<axis = 1>", '<axis = 1, reduction = "mul">', "reduces with mul"),
        ("(nothing, ids", "(nothing, moved", "No TopK|no TopK"),
    ],
)
def test_what_is_none(old: str, new: str, reason: str) -> None:
    assert old in TEXT
    text = TEXT.replace(old, new).replace("size = Shape", "moved = Neg (ids)\n    size = Shape")
    with pytest.raises(NoMatch, match=reason):
        _scattered(text)
