"""row-wise: what mixes or moves rows is told from what does not."""

import pytest

from omforge.ir.infer import infer_model
from omforge.recognition.experts.row_wise import check_row_wise
from omforge.rewriting.match import NoMatch
from omforge.testing import parse

CONSTANTS = """float[4, 2] w = {1,2,3,4,5,6,7,8}, float[4] b = {1,2,3,4}, float[3, 4] same = {1,2,3,4,5,
6,7,8,9,1,2,3}, int64[1] i_0 = {0}, int64[1] i_1 = {1}, int64[1] i_2 = {2}, int64[1] i_m1 = {-1},
int64[3] split = {-1, 2, 2}, int64[3] mixed = {2, -1, 2}"""


def _check(node: str, long: list[bool]) -> None:
    model = parse(f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[n, 4] x, float[n, 4] z) => (float y) <{CONSTANTS}> {{ {node} }}""")
    infer_model(model)
    check_row_wise(next(iter(model.graph)), long)


@pytest.mark.parametrize(
    ("node", "long"),
    [
        ("y = Add (x, z)", [True, True]),
        ("y = Mul (x, b)", [True, False]),
        ("y = MatMul (x, w)", [True, False]),
        ("y = Softmax <axis = -1> (x)", [True]),
        ("y = Slice (x, i_0, i_2, i_1)", [True, False, False, False]),
        ("y = Reshape (x, split)", [True, False]),
        ("y = Unsqueeze (x, i_1)", [True, False]),
        ("y = ReduceMean (x, i_m1)", [True, False]),
        ("y = Concat <axis = 1> (x, z)", [True, True]),
    ],
)
def test_each_row_by_itself(node: str, long: list[bool]) -> None:
    _check(node, long)


@pytest.mark.parametrize(
    ("node", "long"),
    [
        ("y = Add (x, same)", [True, False]),
        ("y = MatMul (x, z)", [True, True]),
        ("y = Softmax <axis = 0> (x)", [True]),
        ("y = Slice (x, i_0, i_2, i_0)", [True, False, False, False]),
        ("y = Reshape (x, mixed)", [True, False]),
        ("y = Unsqueeze (x, i_0)", [True, False]),
        ("y = ReduceMean (x, i_0)", [True, False]),
        ("y = Concat <axis = 0> (x, z)", [True, True]),
        ("y = CumSum (x, i_0)", [True, False]),
        ("y = Transpose <perm = [1, 0]> (x)", [True]),
    ],
)
def test_what_may_mix_rows(node: str, long: list[bool]) -> None:
    with pytest.raises(NoMatch, match="may mix rows"):
        _check(node, long)
