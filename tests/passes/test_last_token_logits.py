"""last-token-logits: the head works on the rows that are asked for."""

import re

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.recognition.step_names import LOGITS_INDEX
from omforge.testing import parse

HEADER = """<ir_version: 11, opset_import: ["" : 24]>
g (int64[B, S] input_ids) => ({outputs})
<float[5, 4] table = {{{table}}}, float[4, 5] head = {{{table}}}, float[4] gamma = {{1, 2, 3, 4}},
 float[5] bias = {{1, 2, 3, 4, 5}}, float cap = {{3.0}}, int64[2] flat = {{-1, 4}},
 int64[1] i0 = {{0}}, int64[1] i2 = {{2}}, int64[1] vocabulary = {{5}}, int64[1] order = {{0}}>
"""
TABLE = ", ".join(str(x / 10) for x in range(-7, 13))
LOOKUP = "x0 = Gather (table, input_ids) x = Sin (x0) "

HEADS = {
    "a product": "logits = MatMul (x, head)",
    "behind a norm": "n = RMSNormalization (x, gamma) logits = MatMul (n, head)",
    "behind a norm whose axis counts from the front": (
        "n = LayerNormalization <axis = 2> (x, gamma) logits = MatMul (n, head)"
    ),
    "with a bias": "a = MatMul (x, head) logits = Add (a, bias)",
    "with a bias of a row": ("a = MatMul (x, head) r = Unsqueeze (bias, i0) logits = Add (a, r)"),
    "capped": "a = MatMul (x, head) b = Div (a, cap) c = Tanh (b) logits = Mul (c, cap)",
    "tied": "t = Transpose <perm = [1, 0]> (table) logits = MatMul (x, t)",
    "tied, in half precision": (
        "t = Cast <to = 10> (table) u = Transpose <perm = [1, 0]> (t) h = Cast <to = 10> (x)"
        " a = MatMul (h, u) logits = Cast <to = 1> (a)"
    ),
    "as a Gemm": (
        "r = Reshape (x, flat) a = Gemm <transB = 1> (r, table, bias)"
        " s = Shape (x, start) p = Slice (s, i0, i2) t = Concat <axis = 0> (p, vocabulary)"
        " logits = Reshape (a, t)"
    ).replace("Shape (x, start)", "Shape (x)"),
}


def text(body: str, outputs: str = "float[B, S, 5] logits") -> str:
    """A model whose hidden state x [B, S, 4] goes through `body`."""
    whole = HEADER.format(outputs=outputs, table=TABLE) + f"{{ {LOOKUP} {body} }}"
    # What is not used would be removed as well.
    for name in ("head", "gamma", "bias", "cap", "flat", "i0", "i2", "vocabulary", "order"):
        if not re.search(rf"\b{name}\b", body):
            whole = re.sub(rf"\w+(\[[\d, ]+\])? {name} = {{[^}}]*}},?\s*", "", whole)
    return re.sub(r",\s*>", ">", whole)


def rows(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1])[index]


@pytest.mark.parametrize("case", HEADS)
def test_gathers_rows_ahead_of_the_head(case: str) -> None:
    original, model = parse(text(HEADS[case])), parse(text(HEADS[case]))
    assert LastTokenLogits().run(model) == 1
    ir.check(model)
    assert [v.name for v in model.graph.inputs] == ["input_ids", LOGITS_INDEX]
    assert [v.name for v in model.graph.outputs] == ["logits"]
    assert str(model.graph.outputs[0].shape) == "[rows,5]"
    feeds = {"input_ids": np.array([[0, 1, 2], [3, 4, 1]])}
    expected = numerics.run(original, feeds)["logits"]
    for index in ([5], [2, 5], [0, 1, 2, 3, 4, 5], [1, 1]):
        got = numerics.run(model, {**feeds, LOGITS_INDEX: np.array(index)})["logits"]
        np.testing.assert_allclose(got, rows(expected, np.array(index)), rtol=2e-6)


@pytest.mark.parametrize("case", HEADS)
def test_nothing_of_the_head_works_on_all_rows(case: str) -> None:
    model = parse(text(HEADS[case]))
    LastTokenLogits().run(model)
    nodes = list(model.graph)
    first = next(
        i for i, node in enumerate(nodes) if LOGITS_INDEX in [v.name for v in node.inputs if v]
    )
    products = [
        i
        for i, node in enumerate(nodes)
        if node.op_type in ("MatMul", "Gemm") or "Norm" in node.op_type
    ]
    assert products
    assert min(products) > first


@pytest.mark.parametrize(("step", "axis", "rows_of"), [("", 1, "x"), ("[2]", 1, "d")])
def test_rounding_to_int8_works_on_rows_if_one_step_does(
    step: str, axis: int, rows_of: str
) -> None:
    """A step for each token would be another one for a row that is gathered ahead of it."""
    numbers = "0.01, 0.5" if step else "0.1"
    source = f"""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[B, 2] input_ids) => (float[B, 2, 5] logits)
    <float[5, 4] table = {{{TABLE}}}, float[4, 5] head = {{{TABLE}}}, float{step} step = {{{numbers}}}>
    {{ {LOOKUP} q = QuantizeLinear <axis = {axis}, output_dtype = 3> (x, step)
       d = DequantizeLinear <axis = {axis}> (q, step) logits = MatMul (d, head) }}"""
    original, model = parse(source), parse(source)
    assert LastTokenLogits().run(model) == 1
    ir.check(model)
    gather = next(n for n in model.graph if LOGITS_INDEX in [v.name for v in n.inputs if v])
    before = {n.op_type for n in list(model.graph)[: list(model.graph).index(gather)]}
    assert ("QuantizeLinear" in before) == (rows_of == "d")
    feeds = {"input_ids": np.array([[0, 1], [3, 4]])}
    expected = numerics.run(original, feeds)["logits"]
    got = numerics.run(model, {**feeds, LOGITS_INDEX: np.array([1, 2])})["logits"]
    np.testing.assert_allclose(got, rows(expected, np.array([1, 2])), rtol=2e-6)


def test_finds_nothing_in_a_second_run() -> None:
    model = parse(text(HEADS["a product"]))
    LastTokenLogits().run(model)
    assert LastTokenLogits().run(model) == 0


LAST = {
    "a slice ahead of the head": (
        "k = Slice (x, m1, far, i1) logits = MatMul (k, head)",
        "B, 1, 5",
    ),
    "a slice of the logits": ("a = MatMul (x, head) logits = Slice (a, m1, far, i1)", "B, 1, 5"),
    "one token, without its axis": (
        "n = RMSNormalization (x, gamma) k = Gather <axis = 1> (n, last) logits = MatMul (k, head)",
        "B, 5",
    ),
}


@pytest.mark.parametrize("case", LAST)
def test_an_export_of_the_last_token_gives_any(case: str) -> None:
    body, shape = LAST[case]
    given = text(body, f"float[{shape}] logits")
    constants = (
        "m1 = Constant <value_ints = [-1]> () far = Constant <value_ints = [9223372036854775807]> ()"
        " i1 = Constant <value_ints = [1]> () last = Constant <value_int = -1> () "
    )
    original = parse(given.replace("{ x0", "{ " + constants + "x0"))
    model = parse(given.replace("{ x0", "{ " + constants + "x0"))
    assert LastTokenLogits().run(model) == 1
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("Gather"), kinds.count("Slice")) == (2, 0)  # the embedding's and the rows'
    tokens = np.array([[0, 3, 1], [2, 4, 4]])
    found = numerics.run(model, {"input_ids": tokens, LOGITS_INDEX: np.array([2, 5])})["logits"]
    wanted = numerics.run(original, {"input_ids": tokens})["logits"].reshape(2, 5)
    assert np.array_equal(found, wanted)


def test_refuses_logits_of_a_token_that_it_cannot_tell() -> None:
    body = "k = Slice (x, i0, i1, i1) logits = MatMul (k, head)"
    given = text(body, "float[B, 1, 5] logits")
    model = parse(given.replace("{ x0", "{ i1 = Constant <value_ints = [1]> () x0"))
    with pytest.raises(ir.InputError, match=r"logits has logits of one token: which one"):
        LastTokenLogits().run(model)


STARTS = {
    "a sum of activations": ("a = Add (x, x0) logits = MatMul (a, head)", "a"),
    "an activation": ("a = Softmax (x) logits = MatMul (a, head)", "a"),
    "a norm over tokens": (
        "a = LayerNormalization <axis = 1> (x, row) logits = MatMul (a, head)",
        "a",
    ),
    "a bias for each token": ("a = MatMul (x, head) c = Add (a, tall) logits = Mul (c, cap)", "c"),
    "a product from the left": ("a = MatMul (square, x) logits = MatMul (a, head)", "a"),
}


@pytest.mark.parametrize("case", STARTS)
def test_starts_behind_what_looks_at_other_rows(case: str) -> None:
    body, start = STARTS[case]
    whole = text(body).replace("<float[5, 4] table", (
        "<float[3, 3] square = {1, 2, 3, 4, 5, 6, 7, 8, 9}, float[3, 1] tall = {1, 2, 3},"
        " float[1, 4] row = {1, 2, 3, 4}, float[5, 4] table"
    ))  # fmt: skip
    original, model = parse(whole), parse(whole)
    assert LastTokenLogits().run(model) == 1
    feeds = {"input_ids": np.array([[0, 1, 2], [3, 4, 1]])}
    expected = numerics.run(original, feeds)["logits"]
    index = np.array([2, 5])
    got = numerics.run(model, {**feeds, LOGITS_INDEX: index})["logits"]
    np.testing.assert_allclose(got, rows(expected, index), rtol=2e-6)
    gather = next(
        n for n in model.graph if n.op_type == "Gather" and n.inputs[1] is model.graph.inputs[1]
    )
    flat = gather.inputs[0]
    assert flat is not None
    producer = flat.producer()
    assert producer is not None
    assert producer.inputs[0] is not None
    assert producer.inputs[0].name == start


def test_another_output_keeps_all_its_rows() -> None:
    """The last hidden state as an output: the rows are taken behind it."""
    body = "hidden = RMSNormalization (x, gamma) logits = MatMul (hidden, head)"
    outputs = "float[B, S, 5] logits, float[B, S, 4] hidden"
    original, model = parse(text(body, outputs)), parse(text(body, outputs))
    LastTokenLogits().run(model)
    feeds = {"input_ids": np.array([[0, 1, 2], [3, 4, 1]])}
    got = numerics.run(model, {**feeds, LOGITS_INDEX: np.array([5])})
    expected = numerics.run(original, feeds)
    np.testing.assert_allclose(got["hidden"], expected["hidden"], rtol=2e-6)
    np.testing.assert_allclose(got["logits"], rows(expected["logits"], np.array([5])), rtol=2e-6)


@pytest.mark.parametrize(
    "body",
    ["a = MatMul (x, head) logits = Softmax (a)",
     "logits = MatMul (x, head) best = ArgMax <axis = 2> (logits)"],
)  # fmt: skip
def test_refuses_logits_that_no_head_makes(body: str) -> None:
    outputs = "float[B, S, 5] logits" + (", int64[B, S, 1] best" if "best" in body else "")
    with pytest.raises(ir.InputError, match="no head makes the output logits"):
        LastTokenLogits().run(parse(text(body, outputs)))
