"""remove-no-ops: what changes nothing goes, and nothing else."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from omforge import ir
from omforge.passes import make_pipeline
from omforge.passes.remove_no_ops import RemoveNoOps
from omforge.testing import (
    assert_leaves_alone,
    assert_near_misses_are_safe,
    assert_rewrites,
    outline,
    parse,
)

CONSTANTS = {
    "one": "float one = {1.0}",
    "minus": "float minus = {-1.0}",
    "nought": "float nought = {0.0}",
    "ones": "float[1, 1] ones = {1.0}",
    "tall": "float[2, 1, 1, 1] tall = {1, 1}",
    "heads": "int64[4] heads = {0, 0, 3, 4}",
    "flat": "int64[3] flat = {0, 0, 12}",
    "i0": "int64[1] i0 = {0}",
    "i1": "int64[1] i1 = {1}",
    "i2": "int64[1] i2 = {2}",
    "far": "int64[1] far = {9999}",
    "yes": "bool yes = {1}",
    "no": "bool no = {0}",
    "ratio": "float ratio = {0.5}",
}


def graph(body: str, outputs: str = "float y") -> str:
    """A graph with those of the constants that its body uses."""
    used = [text for name, text in CONSTANTS.items() if re.search(rf"\b{name}\b", body)]
    constants = f"<{', '.join(used)}>" if used else ""
    return f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[N, S, 12] x, float[1, 1, 12] row) => ({outputs}) {constants} {{ {body} }}"""


DONE = graph("y = Neg (x)")

REMOVED = {
    "Identity": "a = Identity (x) y = Neg (a)",
    "a cast to its own type": "a = Cast <to = 1> (x) b = CastLike (a, row) y = Neg (b)",
    "times one": "a = Mul (x, one) b = Mul (ones, a) c = Div (b, one) y = Neg (c)",
    "plus nought": "a = Add (x, nought) b = Add (nought, a) c = Sub (b, nought) y = Neg (c)",
    "to the power of one": "a = Pow (x, one) y = Neg (a)",
    "one part": "a = Concat <axis = 0> (x) b = Split <num_outputs = 1> (a) y = Neg (b)",
    "dropout": "a = Dropout (x) b = Dropout (a, ratio, no) y = Neg (b)",
    "there and back": "a = Reshape (x, heads) b = Reshape (a, flat) y = Neg (b)",
    "moved and moved back": """a = Transpose <perm = [0, 2, 1]> (x)
        b = Transpose <perm = [0, 2, 1]> (a) y = Neg (b)""",
    "heads split and joined": """a = Reshape (x, heads) b = Transpose <perm = [0, 2, 1, 3]> (a)
        c = Transpose <perm = [0, 2, 1, 3]> (b) d = Reshape (c, flat) y = Neg (d)""",
    "an axis put in and out": "a = Unsqueeze (x, i1) b = Squeeze (a, i1) y = Neg (b)",
    "expanded to its own shape": "s = Shape (x) a = Expand (x, s) y = Neg (a)",
    "all twelve channels": "a = Slice (x, i0, far, i2) y = Neg (a)",
    "what nobody uses": "a = Abs (x) y = Neg (x)",
}


RESPELLED = {
    "nought less it": "y = Sub (nought, x)",
    "times minus one": "y = Mul (x, minus)",
    "minus one times it": "y = Mul (minus, x)",
    "by minus one": "y = Div (x, minus)",
    "three times": "a = Sub (nought, x) b = Mul (a, minus) y = Neg (b)",
}


@pytest.mark.parametrize("case", RESPELLED)
def test_writes_a_negation_in_one_way(case: str) -> None:
    assert_rewrites(RemoveNoOps(), graph(RESPELLED[case]), DONE)


@pytest.mark.parametrize(
    ("body", "one"),
    [
        ("n = Neg (row) y = Add (x, n)", "y = Sub (x, row)"),
        ("n = Neg (row) i = Identity (n) y = Add (x, i)", "y = Sub (x, row)"),
        ("n = Neg (row) y = Add (n, x)", "y = Sub (x, row)"),
        ("n = Mul (row, minus) y = Sub (x, n)", "y = Add (x, row)"),
    ],
)
def test_writes_a_signed_sum_in_one_way(body: str, one: str) -> None:
    assert_rewrites(RemoveNoOps(), graph(body), graph(one))


@pytest.mark.parametrize("case", REMOVED)
def test_removes(case: str) -> None:
    assert_rewrites(RemoveNoOps(), graph(REMOVED[case]), DONE)


def test_of_movement_that_does_not_cancel_the_last_part_stays() -> None:
    moved = "a = Transpose <perm = [1, 0, 2]> (x)"
    back = "b = Transpose <perm = [0, 2, 1]> (a) c = Transpose <perm = [0, 2, 1]> (b)"
    assert_rewrites(
        RemoveNoOps(), graph(f"{moved} {back} y = Neg (c)"), graph(f"{moved} y = Neg (a)")
    )


def test_an_output_keeps_its_name() -> None:
    typed = "float[N, S, 12] y"
    before = graph("a = Neg (x) y = Identity (a)", typed)
    assert_rewrites(RemoveNoOps(), before, graph("y = Neg (x)", typed))


STAYS = {
    "an output that is an input": "y = Identity (x)",
    "an output that is a constant": "y = Identity (one)",
    "two outputs of one value": "z = Neg (x) y = Identity (z)",
    "another type": "a = Cast <to = 10> (x) b = Cast <to = 1> (a) y = Neg (b)",
    "a sum less it": "n = Neg (row) a = Sub (n, x) y = Exp (a)",
    "times one, but taller": "a = Mul (x, tall) y = Neg (a)",
    "plus nought, but taller": "a = Add (row, x) b = Sub (one, a) y = Neg (b)",
    "one by it": "a = Div (one, x) y = Neg (a)",
    "one less it": "a = Sub (one, x) y = Neg (a)",
    "one to its power": "a = Pow (one, x) y = Neg (a)",
    "times nought": "a = Mul (x, nought) y = Neg (a)",
    "plus one": "a = Add (x, one) y = Neg (a)",
    "moved": "a = Transpose <perm = [1, 0, 2]> (x) y = Neg (a)",
    "of another shape": "a = Reshape (x, heads) y = Neg (a)",
    "expanded": "s = Shape (x) a = Expand (row, s) y = Neg (a)",
    "some of the tokens": "a = Slice (x, i0, far, i1) y = Neg (a)",
    "dropout in training": "a, m = Dropout (x, ratio, yes) b = Not (m) c = Cast <to = 1> (b)"
    " y = Add (a, c)",
    "dropout in training, its mask unused": "a = Dropout (x, ratio, yes) y = Neg (a)",
    "dropout by the caller's choice": "n = ReduceMax <keepdims = 0> (x) on = Cast <to = 9> (n)"
    " a = Dropout (x, ratio, on) y = Neg (a)",
    "two parts": "a = Concat <axis = 0> (x, x) y = Neg (a)",
}


@pytest.mark.parametrize("case", STAYS)
def test_leaves_alone(case: str, caplog: pytest.LogCaptureFixture) -> None:
    text = graph(STAYS[case], "float y, float z" if "two outputs" in case else "float y")
    assert_leaves_alone(RemoveNoOps(), text, "", caplog)


def test_of_what_may_be_one_the_expansion_stays(caplog: pytest.LogCaptureFixture) -> None:
    """R and N are two names; a caller may bind R to 1, and then the expansion repeats."""
    text = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[R, 4] x, float[N, 4] like) => (float[N, 4] y) {
        s = Shape (like) a = Expand (x, s) y = Neg (a)
    }"""
    assert_leaves_alone(RemoveNoOps(), text, "", caplog)


@pytest.mark.parametrize(
    "body",
    [
        "a = Mul (x, one) y = Neg (a)",
        "a = Sub (x, nought) y = Neg (a)",
        "a = Cast <to = 1> (x) y = Neg (a)",
        REMOVED["moved and moved back"],
        REMOVED["there and back"],
        REMOVED["all twelve channels"],
    ],
)
def test_near_misses_are_safe(body: str) -> None:
    assert assert_near_misses_are_safe(RemoveNoOps(), graph(body))


def test_a_real_export_keeps_its_interface(exported: Callable[[str, str], Path]) -> None:
    model = ir.load(exported("torchscript-op17", "llama_mha"))
    before = [line for line in outline(model) if line.startswith(("input", "output"))]
    make_pipeline("fold-constants,remove-no-ops").run(model)
    names = [line.split(":")[0] for line in before]
    after = [line for line in outline(model) if line.startswith(("input", "output"))]
    assert [line.split(":")[0] for line in after] == names
    assert "Identity" not in {node.op_type for node in model.graph}


def test_finds_the_shape_itself() -> None:
    """A pass need not have inferred before: sizes are derived from the inputs."""
    model = ir.from_onnx_text(graph(REMOVED["there and back"]))
    assert RemoveNoOps().run(model) > 0
    assert outline(model)[-2:] == outline(parse(DONE))[-2:]
