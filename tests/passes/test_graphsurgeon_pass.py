"""GraphSurgeonPass: a user's function, watched like any pass."""

from typing import Any

import pytest

from omforge.ir.errors import CheckError, OmforgeError
from omforge.passes import GraphSurgeonPass, Pipeline
from omforge.rewriting.instruments import CompareEach, VerifyEach
from omforge.testing import parse, several_feeds

MODEL = """<ir_version: 10, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y) <float two = {2.0}> { h = Pow (x, two) y = Neg (h) }"""


def square_by_mul(graph: Any) -> None:
    for node in graph.nodes:
        if node.op == "Pow":
            node.op = "Mul"
            node.inputs[1] = node.inputs[0]


def forget_the_sign(graph: Any) -> None:
    for node in graph.nodes:
        if node.op == "Neg":
            node.op = "Abs"


def rename_input(graph: Any) -> None:
    graph.inputs[0].name = "tokens"


def test_runs_between_other_passes_under_its_own_name() -> None:
    model = parse(MODEL)
    step = GraphSurgeonPass("square-by-mul", function=square_by_mul)
    (run,) = Pipeline((step,)).run(model, [VerifyEach(), CompareEach(several_feeds)]).passes
    assert [node.op_type for node in model.graph] == ["Mul", "Neg"]
    assert (run.name, run.rewrites) == ("square-by-mul", 1)
    assert run.max_abs_diff is not None
    assert run.max_abs_diff < 1e-5


def test_a_function_that_moves_the_numbers_is_stopped() -> None:
    step = GraphSurgeonPass("forget-the-sign", function=forget_the_sign)
    with pytest.raises(CheckError, match="forget-the-sign moves the numbers of y"):
        Pipeline((step,)).run(parse(MODEL), [CompareEach(several_feeds)])


def test_a_function_may_say_that_it_changes_the_interface() -> None:
    model = parse(MODEL)
    step = GraphSurgeonPass("rename", function=rename_input, changes_interface=True)
    (run,) = Pipeline((step,)).run(model, [CompareEach(several_feeds)]).passes
    assert run.note == "not compared: it changes the interface"
    assert [value.name for value in model.graph.inputs] == ["tokens"]


def test_a_function_that_fails_leaves_the_model() -> None:
    def fails(_: Any) -> None:
        raise KeyError("no such node")

    model = parse(MODEL)
    with pytest.raises(OmforgeError, match="fails failed: KeyError"):
        GraphSurgeonPass("fails", function=fails).run(model)
    assert [node.op_type for node in model.graph] == ["Pow", "Neg"]
