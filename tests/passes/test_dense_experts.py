"""dense-experts: every expert computes all tokens, and those that did not choose it weigh nothing."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.numerics import run, tolerance, within
from omforge.ir.values import dims
from omforge.ir.verify import check
from omforge.passes.dense_experts import DenseExperts
from omforge.rewriting.events import events
from omforge.testing import parse

# Two experts of four, of a router that chooses two for each token.
MODEL = """<ir_version: 11, opset_import: ["" : 24]>
g (float[n, 4] x) => (float[n, 4] y)
<int64[1] k = {2}, int64 depth = {4}, int64[2] off_on = {0, 1}, int64[1] first = {0},
 int64[1] second = {1}, int64[2] width = {1, 4}, int64[2] column = {-1, 1}, int64 two = {2},
 float[4, 4] w1 = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, float[4, 4] w2 = {4,3,2,1,8,7,6,5,1,9,3,2,7,6,5,4},
 int64 e1 = {0}, int64 e2 = {3}, float[1] low = {0.5}> {
    shares, choices = TopK (x, k)
    one_hot = OneHot <axis = -1> (choices, depth, off_on)
    experts = Transpose <perm = [PERM]> (one_hot)
    flat = Reshape (shares, column)
    shape = Shape (x)
    zeros = ConstantOfShape (shape)
    EXPERT(1)
    EXPERT(2)
    y = Add (out1, out2)
}"""
EXPERT = """is# = Gather <axis = 0> (experts, e#)
    chosen# = Cast <to = 9> (is#)
    found# = NonZero (chosen#)
    pairs# = Transpose <perm = [1, 0]> (found#)
    one#, other# = Split <axis = 1, num_outputs = 2> (pairs#)
    token# = Squeeze (TOKEN#, second)
    slot# = Squeeze (SLOT#, second)
    rows# = Gather <axis = 0> (x, token#)
    up# = MatMul (rows#, w#)
    gate# = Swish (up#)
    base# = Mul (token#, two)
    place# = Add (base#, slot#)
    share# = Gather <axis = 0> (flat, place#)
    weighed# = Mul (gate#, share#)
    where# = Expand (TOKEN#, width)
    out# = ScatterElements <axis = 0> (zeros, where#, weighed#)"""


def _text(perm: str) -> str:
    tokens_first = perm == "2, 0, 1"
    text = MODEL.replace("PERM", perm)
    for number in "12":
        text = text.replace(f"EXPERT({number})", EXPERT.replace("#", number))
    token, slot = ("one", "other") if tokens_first else ("other", "one")
    return text.replace("TOKEN", token).replace("SLOT", slot)


MODEL_OF_TWO_EXPERTS = _text("2, 0, 1")


@pytest.mark.parametrize("perm", ["2, 0, 1", "2, 1, 0"])
def test_the_numbers_stay_and_no_size_depends_on_the_data(perm: str) -> None:
    before, model = parse(_text(perm)), parse(_text(perm))
    assert DenseExperts().run(model) == 2
    check(model)
    infer_model(model)
    assert not {"NonZero", "ScatterElements"} & {node.op_type for node in model.graph}
    sizes = {str(n) for node in model.graph for v in node.outputs for n in dims(v) or ()}
    assert not [size for size in sizes if "unknown" in size]
    for rows in (1, 7):
        x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
        expected, got = run(before, {"x": x}), run(model, {"x": x})
        assert within(got["y"], expected["y"], tolerance("float32"))
    told = [str(event) for event in events(model)]
    assert any("every expert computes all tokens" in text for text in told)
    assert DenseExperts().run(model) == 0


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("gate1 = Swish (up1)", "gate1 = Softmax <axis = 0> (up1)", "Softmax may mix the tokens"),
        ("where1 = Expand (TOKEN, width)", "where1 = Expand (SLOT, width)", "not put back by"),
        ("zeros = ConstantOfShape (shape)", "zeros = Neg (x)", "replace what is no zero"),
        ("chosen1 = Cast <to = 9> (is1)", "no1 = Cast <to = 9> (is1)\n chosen1 = Not (no1)", "say"),
        (
            "gate1 = Swish (up1)",
            "s1 = Shape <end = 1> (up1)\n c1 = Cast <to = 1> (s1)\n gate1 = Mul (up1, c1)",
            "used as a number",
        ),
    ],
)
def test_what_is_not_row_by_row_stays(old: str, new: str, reason: str) -> None:
    fitted = [text.replace("TOKEN", "other1").replace("SLOT", "one1") for text in (old, new)]
    text = _text("2, 1, 0")
    assert fitted[0] in text
    model = parse(text.replace(*fitted))
    DenseExperts().run(model)
    assert "NonZero" in {node.op_type for node in model.graph}
    assert any(reason in event.reason for event in events(model))
    assert isinstance(model, ir.Model)
