"""ungroup-experts: tokens sorted by expert become all tokens of every expert, and a choice."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.numerics import run, tolerance, within
from omforge.ir.values import dims
from omforge.ir.verify import check
from omforge.passes.ungroup_experts import UngroupExperts
from omforge.rewriting.events import events
from omforge.testing import parse

# Three experts, a router that chooses two for each token, biases by expert.
MODEL = """<ir_version: 11, opset_import: ["" : 24]>
g (float[n, 4] x, float[n, 3] scores) => (float[n, 4] y)
<int64[1] k = {2}, int64[1] flat = {-1}, int64 zero = {0}, int64 one = {1}, int64 two = {2},
 int64[1] column = {1}, int64[3] off = {0, 0, 0}, int64[1] lead = {0}, int64[3] pairs = {-1, 2, 4},
 int64[1] middle = {1}, float[4, 2] w1 = {1,2,3,4,5,6,7,8}, float[4, 2] w2 = {-4,3,2,1,8,7,-6,5},
 float[4, 2] w3 = {0,1,0,-1,1,2,0,2}, float[2, 4] v1 = {1,2,3,4,5,6,7,8},
 float[2, 4] v2 = {4,3,-2,1,8,7,6,5}, float[2, 4] v3 = {1,0,1,0,1,0,-1,0},
 float[3, 2] bias = {0.5, -1, 2, 0, 1, 1}> {
    shares, choices = TopK (scores, k)
    share = Reshape (shares, flat)
    chosen = Reshape (choices, flat)
    all = Shape (chosen)
    ids, order = TopK <largest = 0> (chosen, all)
    token = Div (order, two)
    token_c = Unsqueeze (token, column)
    sorted = GatherND (x, token_c)
    order_c = Unsqueeze (order, column)
    share_s = GatherND (share, order_c)
    ones = Expand (one, all)
    counts = ScatterElements <reduction = "add"> (off, ids, ones)
    ends = CumSum (counts, zero)
    ends1, ends2, ends3 = Split <num_outputs = 3> (ends)
    end1 = Squeeze (ends1)
    end2 = Squeeze (ends2)
    end3 = Squeeze (ends3)
    those1 = Range (zero, end1, one)
    those2 = Range (end1, end2, one)
    those3 = Range (end2, end3, one)
    PRODUCTS(up, sorted, w)
    ids_c = Unsqueeze (ids, column)
    bias_s = GatherND (bias, ids_c)
    biased = Add (up, bias_s)
    gate = Sigmoid (biased)
    act = Mul (biased, gate)
    PRODUCTS(down, act, v)
    share_c = Unsqueeze (share_s, column)
    weighed = Mul (down, share_c)
    count = Squeeze (all)
    places = Range (zero, count, one)
    nowhere = Expand (zero, all)
    back = ScatterND (nowhere, order_c, places)
    back_c = Unsqueeze (back, column)
    restored = GatherND (weighed, back_c)
    rows = Reshape (restored, pairs)
    y = ReduceSum <keepdims = 0> (rows, middle)
}"""


def _products(text: str) -> str:
    for name, rows, weight in (("up", "sorted", "w"), ("down", "act", "v")):
        parts = [
            f"{name}_in{e} = Gather ({rows}, those{e})\n"
            f"{name}{e} = MatMul ({name}_in{e}, {weight}{e})"
            for e in (1, 2, 3)
        ]
        joined = f"{name} = Concat <axis = 0> ({name}1, {name}2, {name}3)"
        text = text.replace(f"PRODUCTS({name}, {rows}, {weight})", "\n".join([*parts, joined]))
    return text


TEXT = _products(MODEL)


def _feeds(tokens: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(tokens)
    shapes = {"x": (tokens, 4), "scores": (tokens, 3)}
    return {k: random.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_the_numbers_stay_and_no_size_depends_on_the_data(tokens: int) -> None:
    before, model = parse(TEXT), parse(TEXT)
    assert UngroupExperts().run(model) == 2
    check(model)
    feeds = _feeds(tokens)
    expected, got = run(before, feeds), run(model, feeds)
    assert within(got["y"], expected["y"], tolerance("float32"))


def test_the_sort_its_histogram_and_its_way_back_are_gone() -> None:
    model = parse(TEXT)
    UngroupExperts().run(model)
    kinds = [node.op_type for node in model.graph]
    assert not {"ScatterElements", "ScatterND", "CumSum", "GatherND"} & set(kinds)
    assert kinds.count("TopK") == 1
    infer_model(model)
    sizes = {str(n) for node in model.graph for v in node.outputs for n in dims(v) or ()}
    assert not [size for size in sizes if "unknown" in size]
    told = [str(event) for event in events(model)]
    assert any("every expert computes all tokens" in text for text in told)
    assert UngroupExperts().run(model) == 0


def test_one_expert_for_each_token() -> None:
    """A choice is a token then, and what exporters divide by 1 may be the order itself."""
    one = TEXT.replace("int64[1] k = {2}", "int64[1] k = {1}").replace("{-1, 2, 4}", "{-1, 1, 4}")
    assert "token = Div (order, two)" in one
    for token in ("Div (order, one)", "Identity (order)"):
        before, model = (parse(one.replace("Div (order, two)", token)) for _ in range(2))
        assert UngroupExperts().run(model) == 2
        for tokens in (1, 5):
            feeds = _feeds(tokens)
            expected, got = run(before, feeds), run(model, feeds)
            assert within(got["y"], expected["y"], tolerance("float32"))


def test_an_expert_that_overflows_does_not_matter_to_who_did_not_choose_it() -> None:
    model = parse(TEXT.replace("float[2, 4] v3 = {1,", "float[2, 4] v3 = {inf,"))
    UngroupExperts().run(model)
    feeds = _feeds(5)
    feeds["scores"][:, 2] = -9
    assert np.isfinite(run(model, feeds)["y"]).all()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("those2 = Range (end1", "those2 = Range (zero", "does not take the rows that chose it"),
        ("places = Range (zero, count, one)", "places = Range (one, count2, one)", "nothing takes"),
        ("gate = Sigmoid (biased)", "gate = Softmax <axis = 0> (biased)", "Softmax may mix rows"),
        ("token = Div (order, two)", "token = Div (order, three)", "neither by token nor by"),
        ("(chosen, all)", "(chosen, k)", "does not sort all"),
    ],
)
def test_what_is_no_permutation_of_rows_stays(old: str, new: str, reason: str) -> None:
    assert old in TEXT
    text = TEXT.replace(old, new)
    text = text.replace("int64 two = {2},", "int64 two = {2}, int64 three = {3},")
    text = text.replace(
        "count = Squeeze (all)", "count = Squeeze (all)\n count2 = Add (count, one)"
    )
    model = parse(text)
    assert UngroupExperts().run(model) == 0
    assert any(reason in event.reason for event in events(model)), [e.reason for e in events(model)]
    assert isinstance(model, ir.Model)


# Rows split by how many chose an expert, and scattered back; products that turn their weights, as
# linear layers do; a second mixture whose rows are the first's, one for each choice.
SPLIT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[n, 4] x, float[n, 3] scores) => (float[n, 4] y, float[n, 6] z)
<int64[1] k = {2}, int64[1] flat = {-1}, int64 two = {2}, int64 three = {3}, int64[1] column = {1},
 int64[1] lead = {0}, int64[1] both = {2}, int64[2] ones2 = {1, 1}, float zero = {0},
 float[2, 4] w1 = {1,2,3,4,5,6,7,8}, float[2, 4] w2 = {-4,3,2,1,8,7,-6,5},
 float[2, 4] w3 = {0,1,0,-1,1,2,0,2}, float[4, 2] v1 = {1,2,3,4,5,6,7,8},
 float[4, 2] v2 = {4,3,-2,1,8,7,6,5}, float[4, 2] v3 = {1,0,1,0,1,0,-1,0},
 float[6, 4] u1 = {1,2,3,4,5,6,7,8,1,0,1,0,2,2,0,1,-1,1,1,3,2,1,0,1},
 float[6, 4] u2 = {0,2,3,4,5,6,-7,8,1,0,1,0,2,2,0,1,-1,1,1,3,2,1,0,2},
 float[6, 4] u3 = {3,2,3,4,5,-6,7,8,1,0,1,0,2,2,0,1,-1,1,1,3,2,1,0,3}> {
    shares, choices = TopK (scores, k)
    shape_s = Shape (scores)
    off = ConstantOfShape (shape_s)
    shape_c = Shape (choices)
    on = ConstantOfShape <value = float[1] {1}> (shape_c)
    hot = ScatterElements <axis = 1> (off, choices, on)
    hot_i = Cast <to = 7> (hot)
    counts = ReduceSum <keepdims = 0> (hot_i, lead)
    chosen = Reshape (choices, flat)
    all = Shape (chosen)
    ids, order = TopK <largest = 0> (chosen, all)
    token = Div (order, two)
    token_c = Unsqueeze (token, column)
    order_c = Unsqueeze (order, column)
    share = Reshape (shares, flat)
    share_s = GatherND (share, order_c)
    sorted = GatherND (x, token_c)
    a1, a2, a3 = Split (sorted, counts)
    b1 = Gemm <transB = 1> (a1, w1)
    b2 = Gemm <transB = 1> (a2, w2)
    b3 = Gemm <transB = 1> (a3, w3)
    up = Concat <axis = 0> (b1, b2, b3)
    act = Sigmoid (up)
    c1, c2, c3 = Split (act, counts)
    d1 = Gemm <transB = 1> (c1, v1)
    d2 = Gemm <transB = 1> (c2, v2)
    d3 = Gemm <transB = 1> (c3, v3)
    down = Concat <axis = 0> (d1, d2, d3)
    same = Expand (down, ones2)
    rows = Concat <axis = 0> (all, four)
    nothing = Expand (zero, rows)
    of_choices = ScatterND <reduction = "add"> (nothing, order_c, same)
    curved = Tanh (of_choices)
    again = GatherND (curved, order_c)
    e1, e2, e3 = Split (again, counts)
    f1 = Gemm <transB = 1> (e1, u1)
    f2 = Gemm <transB = 1> (e2, u2)
    f3 = Gemm <transB = 1> (e3, u3)
    wide = Concat <axis = 0> (f1, f2, f3)
    share_c = Unsqueeze (share_s, column)
    weighed = Mul (wide, share_c)
    tokens = Shape <end = 1> (x)
    rows6 = Concat <axis = 0> (tokens, six)
    nothing6 = Expand (zero, rows6)
    z = ScatterND <reduction = "add"> (nothing6, token_c, weighed)
    summed = Mul (same, share_c)
    shape_x = Shape (x)
    nothing4 = ConstantOfShape (shape_x)
    y = ScatterND <reduction = "add"> (nothing4, token_c, summed)
}""".replace("int64[1] k = {2}", "int64[1] k = {2}, int64[1] four = {4}, int64[1] six = {6}")


def _same(before: ir.Model, after: ir.Model) -> None:
    for tokens in (1, 2, 7):
        expected, got = (run(model, _feeds(tokens)) for model in (before, after))
        for name, array in expected.items():
            assert within(got[name], array, tolerance("float32")), name


def test_rows_that_are_split_and_scattered() -> None:
    """Also where a second mixture takes what the first made for each choice."""
    before, model = parse(SPLIT), parse(SPLIT)
    assert UngroupExperts().run(model) == 3
    check(model)
    _same(before, model)
    kinds = [node.op_type for node in model.graph]
    assert not {"ScatterElements", "ScatterND", "GatherND", "Gemm"} & set(kinds)
    assert kinds.count("TopK") == 1
    infer_model(model)
    sizes = {str(n) for node in model.graph for v in node.outputs for n in dims(v) or ()}
    assert not [size for size in sizes if "unknown" in size]
    assert UngroupExperts().run(model) == 0


def test_split_products_with_a_bias_stay_products_of_each_expert() -> None:
    text = SPLIT
    for expert in (1, 2, 3):
        text = text.replace(f"(e{expert}, u{expert})", f"(e{expert}, u{expert}, t{expert})")
        text = text.replace(
            "float zero", f"float[6] t{expert} = {{{expert},1,2,0,0,1}}, float zero"
        )
    before, model = parse(text), parse(text)
    assert UngroupExperts().run(model) == 3
    assert [node.op_type for node in model.graph].count("Gemm") == 3
    _same(before, model)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        # A histogram of something else, of the next token's choices say.
        ("(hot_i, lead)", "(turned, lead)", "no products of sorted rows"),
        (
            "up = Concat <axis = 0> (b1, b2, b3)",
            "up = Concat <axis = 0> (b2, b1, b3)",
            "may mix rows",
        ),
        ("(nothing4, token_c,", "(x, token_c,", "mix rows"),
        ('<reduction = "add"> (nothing4', '<reduction = "max"> (nothing4', "mix rows"),
        ("token = Div (order, two)", "token = Div (order, three)", "mix rows"),
        ("act = Sigmoid (up)", "act = Softmax <axis = 0> (up)", "Softmax may mix rows"),
    ],
)
def test_what_is_split_or_scattered_otherwise_stays(old: str, new: str, reason: str) -> None:
    assert old in SPLIT
    text = SPLIT.replace(old, new)
    if "turned" in new:
        text = text.replace(
            "counts =", "s1, s2, s3 = Split <axis = 1, num_outputs = 3> (hot_i)\n"
            "turned = Concat <axis = 1> (s2, s3, s1)\n counts ="
        )  # fmt: skip
    model = parse(text)
    before = [node.op_type for node in model.graph]
    assert UngroupExperts().run(model) == 0
    assert [node.op_type for node in model.graph] == before
    told = [str(event) for event in events(model)]
    assert any(reason in line for line in told), told
