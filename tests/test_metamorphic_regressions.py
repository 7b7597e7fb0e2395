"""Spellings that once kept a block from being raised, found by tests/test_metamorphic.py."""

import numpy as np
import pytest

from omforge import ir
from omforge.passes import make_pipeline
from omforge.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from omforge.passes.fold_constants import FoldConstants
from omforge.passes.fuse_gelu import FuseGelu
from omforge.passes.fuse_rms_norm import FuseRmsNorm
from omforge.passes.fuse_swish import FuseSwish
from omforge.passes.merge_slices import MergeSlices
from omforge.passes.remove_no_ops import RemoveNoOps
from omforge.testing import assert_same_numbers, parse
from tests.variants import problem

HEAD = '<ir_version: 10, opset_import: ["": 24]> g (float[2,8] x, float[2,8] z) => (float[2,8] y)\n'
CONSTANTS = "<float half = {0.5}, float one = {1}, float two = {2}, float root = {0.70710678}>\n"


def left(step: object, body: str) -> list[str]:
    """The operators after a pass, its numbers checked."""
    text = HEAD + CONSTANTS + "{" + body + "}"
    before, model = parse(text), parse(text)
    assert step.run(model)
    assert_same_numbers(before, model)
    return sorted(node.op_type for node in model.graph)


BELOW = "n = Neg (x) e = Exp (n) b = Add (e, one)"


@pytest.mark.parametrize(
    "body",
    [
        "s = Sigmoid (x) g = Mul (s, z) y = Mul (x, g)",
        "s = Sigmoid (x) g = Mul (x, z) y = Mul (s, g)",
        f"{BELOW} g = Div (z, b) y = Mul (g, x)",
        f"{BELOW} g = Mul (x, z) y = Div (g, b)",
        f"{BELOW} s = Reciprocal (b) g = Mul (s, x) y = Mul (g, z)",
        f"{BELOW} s = Div (one, b) g = Mul (s, x) y = Mul (g, z)",
    ],
)
def test_a_gated_silu_in_any_association(body):
    assert left(FuseSwish(), body) == ["Mul", "Swish"]


@pytest.mark.parametrize(
    "body",
    [
        "g = Mul (c, z) h = Mul (x, half) y = Mul (h, g)",
        "g = Mul (half, z) h = Mul (g, c) y = Mul (x, h)",
    ],
)
def test_a_gated_gelu_in_any_association(body):
    erf = "r = Mul (x, root) t = Erf (r) c = Add (t, one)"
    assert left(FuseGelu(), f"{erf} {body}") == ["Gelu", "Mul"]


@pytest.mark.parametrize("body", ["g = Div (w, r) y = Mul (x, g)", "g = Mul (x, w) y = Div (g, r)"])
def test_an_rms_norm_whose_weight_is_divided(body):
    text = (
        '<ir_version: 10, opset_import: ["": 24]> g (float[2,8] x) => (float[2,8] y)\n'
        "<float two = {2}, float eps = {0.00001}, int64[1] last = {-1},"
        " float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}>\n"
        "{ p = Pow (x, two) m = ReduceMean (p, last) v = Add (m, eps) r = Sqrt (v) " + body + " }"
    )
    before, model = parse(text), parse(text)
    assert FuseRmsNorm().run(model) == 1
    assert_same_numbers(before, model)


@pytest.mark.parametrize(
    ("body", "operators"),
    [
        ("d = Cast <to = 11> (x) f = Cast <to = 1> (d) y = Mul (f, z)", ["Mul"]),
        # Not the other way round: the half has forgotten what the cast cannot give back.
        ("d = Cast <to = 10> (x) f = Cast <to = 1> (d) y = Mul (f, z)", ["Cast", "Cast", "Mul"]),
        ("c = Less (x, z) n = Not (c) y = Where (n, x, z)", ["Less", "Where"]),
        ("c = Less (x, z) n = Not (c) m = Not (n) y = Where (m, x, z)", ["Less", "Where"]),
    ],
)
def test_no_ops_of_two_nodes(body, operators):
    assert left(RemoveNoOps(), body) == operators


def test_swapped_operands_are_common_subexpressions():
    body = "a = Mul (x, z) b = Mul (z, x) c = Add (a, two) d = Add (two, b) y = Sub (c, d)"
    assert left(EliminateCommonSubexpressions(), body) == ["Add", "Mul", "Sub"]


def test_constants_computed_twice_are_one():
    body = "a = Add (one, two) b = Add (two, one) c = Mul (x, a) d = Mul (z, b) y = Add (c, d)"
    model = parse(HEAD + CONSTANTS + "{" + body + "}")
    FoldConstants().run(model)
    first, second, _ = model.graph
    assert first.inputs[1] is second.inputs[1]


def test_slices_of_slices_are_merged():
    text = """<ir_version: 10, opset_import: ["": 24]> g (float[2,8] x) => (float[2,8] y)
    <int64[1] n0 = {0}, int64[1] n2 = {2}, int64[1] n4 = {4}, int64[1] n8 = {8},
     int64[1] last = {-1}>
    {
        a = Slice (x, n0, n4, last)
        b = Slice (x, n4, n8, last)
        c = Slice (a, n0, n2, last)
        d = Slice (a, n2, n4, last)
        y = Concat <axis = -1> (d, c, b)
    }"""
    before, model = parse(text), parse(text)
    assert MergeSlices().run(model) == 4
    ir.check(model)
    assert_same_numbers(before, model)


@pytest.mark.parametrize(
    ("pair", "steps"),
    [
        # Movement around the tokens and the embedding hid which input is which.
        (("dynamo", "gpt_neox"), [("insert-transposes", 1)]),
        (("hfexporter", "phi3"), [("insert-reshapes", 1)]),
        # A cast on one of the two uses of the probabilities.
        (("dynamo", "qwen2"), [("insert-casts", 1)]),
        # The cap's division moved to the other side of the product.
        (("torchscript-op17", "gemma2"), [("move-scales", 0)]),
        # The cap's factors as divisions by their inverses, and as products.
        (("hfexporter", "gemma2"), [("respell-division", 4)]),
        (("hfexporter", "gemma2"), [("respell-division", 909)]),
        # The constants of a GELU.
        (("optimum", "gemma2"), [("respell-division", 0)]),
        # The negation inside a sigmoid that is written out.
        (("optimum", "qwen2"), [("respell-sigmoid", 0), ("respell-negation", 9)]),
        (("hfexporter", "qwen3"), [("respell-sigmoid", 6), ("respell-negation", 2)]),
        # A contrib operator that nobody uses any more.
        (("genai", "qwen3"), [("add-dead-nodes", 0), ("duplicate-nodes", 187)]),
        # Functions of an earlier step, which a later one took the names of.
        (("dynamo", "llama_gqa"), [("outline-functions", 0), ("outline-functions", 333)]),
        (("dynamo", "llama_mha"), [("outline-functions", 0), ("outline-functions", 0)]),
    ],
)
def test_exports_in_other_words(pair, steps):
    assert not problem(*pair, steps)


def test_a_row_that_a_kept_mask_hides_whole_gets_a_mean():
    """ONNX Runtime's Attention takes a row of the lowest number for one that sees nothing."""
    low = float(np.finfo(np.float32).min)
    text = f"""<ir_version: 10, opset_import: ["": 24]>
    g (int64[batch,seq] input_ids) => (float[batch,seq,4] logits)
    <float[4,4] table = {{1,2,3,4, 4,3,2,1, 1,3,5,7, 2,4,6,1}}, int64[4] heads = {{0,0,1,4}},
     int64[3] flat = {{0,0,4}}, float low = {{{low!r}}}, float none = {{0}},
     int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}, int64[1] axis = {{1}}>
    {{
        e = Gather (table, input_ids)
        r = Reshape (e, heads)
        q = Transpose <perm = [0,2,1,3]> (r)
        k = Transpose <perm = [0,2,3,1]> (r)
        s = MatMul (q, k)
        n = Shape <start = 1, end = 2> (input_ids)
        m = Squeeze (n)
        i = Range (zero, m, one)
        h = Less (i, two)
        v = Where (h, low, none)
        w = Unsqueeze (v, axis)
        a = Add (s, w)
        p = Softmax (a)
        o = MatMul (p, q)
        t = Transpose <perm = [0,2,1,3]> (o)
        logits = Reshape (t, flat)
    }}"""
    before, model = parse(text), parse(text)
    make_pipeline("raise").run(model)
    assert sum(node.op_type == "Attention" for node in model.graph) == 1
    feeds = [{"input_ids": np.array([[0, 1, 2, 3], [3, 0, 1, 2]])}]
    assert_same_numbers(before, model, feeds)
