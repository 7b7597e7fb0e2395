"""Routers: the last choice of a mixture of experts."""

import pytest

from omforge.ir.infer import infer_model
from omforge.recognition.experts.routers import find_routers
from omforge.testing import parse

BODY = {
    "one": "best, ids = TopK (x, k)  y = Identity (ids)",
    "of groups": """groups = Reshape (x, apart)
        most, at = TopK (groups, one)
        wide = Expand (most, pair)
        again = Reshape (wide, together)
        kept = Add (x, again)
        places = Cast <to = 1> (at)
        mean = ReduceMean <keepdims = 1> (places)
        added = Squeeze (mean)
        scores = Add (kept, added)
        best, ids = TopK (scores, k)
        y = Identity (ids)""",
}


def _routers(body: str) -> int:
    model = parse(f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[n, 4] x) => (int64[n, 2] y)
    <int64[1] k = {{2}}, int64[1] one = {{1}}, int64[3] apart = {{-1, 2, 2}},
     int64[3] pair = {{1, 1, 2}}, int64[2] together = {{-1, 4}}> {{ {body} }}""")
    infer_model(model)
    return len(find_routers(model))


@pytest.mark.parametrize("kind", BODY)
def test_a_mixture_has_one(kind: str) -> None:
    """A choice of groups ahead of that of experts is not counted twice."""
    assert _routers(BODY[kind]) == 1


@pytest.mark.parametrize(
    "body",
    [
        "best, ids = TopK <largest = 0> (x, k)  y = Identity (ids)",
        "best, ids = TopK <axis = 0> (x, k)  y = Transpose <perm = [1, 0]> (ids)",
        "best, ids = TopK (x, k)  y = Cast <to = 7> (best)",
    ],
)
def test_another_choice_is_none(body: str) -> None:
    assert _routers(body) == 0
