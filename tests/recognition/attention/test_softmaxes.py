"""A softmax is attention's where its weights are multiplied by values."""

import pytest

from omforge.recognition.attention.softmaxes import weighs_values
from omforge.recognition.coverage import measure
from omforge.testing import parse

BEHIND = {
    "values": ("y = MatMul (p, v)", True),
    "a cast, dropout and a scale": (
        "c = Cast <to = 1> (p) d, m = Dropout (c) s = Mul (d, half) y = MatMul (s, v)",
        True,
    ),
    "padding set to 0": ("w = Where (seen, p, zero) y = MatMul (w, v)", True),
    "a sink that is cut off": ("w = Slice (p, start, end, axis) y = MatMul (w, v)", True),
    "heads in one axis": ('y = Einsum <equation = "bqk,bkd->bqd"> (p, v)', True),
    "a router": ("t, i = TopK (p, one) y = Identity (t)", False),
    "a router whose weights stay": ("y = Mul (p, v)", False),
    "an output": ("y = Identity (p)", False),
    "a projection of it": ("y = MatMul (p, weight)", False),
}


@pytest.mark.parametrize(("nodes", "attention"), BEHIND.values(), ids=BEHIND)
def test_what_stands_behind_a_softmax_decides(nodes: str, attention: bool) -> None:
    model = parse(f"""<ir_version: 10, opset_import: ["" : 18]>
        g (float[2, 3, 3] x, float[2, 3, 3] v, bool[2, 3, 3] seen) => (y)
        <float half = {{0.5}}, float zero = {{0}}, int64[1] one = {{1}}, int64[1] start = {{0}},
         int64[1] end = {{3}}, int64[1] axis = {{2}},
         float[3, 3] weight = {{1, 2, 3, 4, 5, 6, 7, 8, 9}}>
        {{ p = Softmax (x) {nodes} }}""")
    (softmax,) = [node for node in model.graph if node.op_type == "Softmax"]
    assert weighs_values(softmax) == attention
    assert measure(model, None).kinds["attention"].expected == attention
