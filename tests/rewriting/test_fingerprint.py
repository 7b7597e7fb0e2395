"""A pass that changes the model says so: its count is held against the model itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from omforge import ir
from omforge.ir.errors import CheckError
from omforge.ir.infer import infer_model
from omforge.passes import make_pipeline
from omforge.rewriting.base import Pass
from omforge.rewriting.fingerprint import fingerprint
from omforge.rewriting.pipeline import Pipeline
from omforge.testing import parse


@dataclass(frozen=True)
class Silent(Pass):
    """Change something, and return 0."""

    name: ClassVar[str] = "silent"
    edit: Callable[[ir.Model], object]

    def run(self, model: ir.Model) -> int:
        self.edit(model)
        return 0


def look(model: ir.Model) -> None:
    """Change nothing."""


WEIGHT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 4] x) => (float[N, 4] y) <float two = {2.0}> {
    h = Cast <to = 1> (x) k = Neg (h) y = Mul (k, two)
}"""


@pytest.mark.parametrize(
    ("edit", "place"),
    [
        (lambda m: m.graph[0].attributes.__setitem__("to", ir.AttrInt64("to", 1)), ""),
        (lambda m: m.graph[0].attributes.__setitem__("to", ir.AttrInt64("to", 10)), "Cast"),
        (lambda m: m.graph[1].replace_input_with(0, m.graph.inputs[0]), "Neg"),
        (lambda m: setattr(m.graph[1], "op_type", "Abs"), "Abs k, where Neg k was"),
        (lambda m: m.graph.append(ir.node("Abs", [m.graph.inputs[0]])), "Abs"),
        (lambda m: setattr(m.graph[0].outputs[0], "name", "renamed"), "Cast"),
        (lambda m: setattr(m.graph.inputs[0], "shape", ir.Shape([2, 4])), "input x"),
        (lambda m: m.graph.opset_imports.__setitem__("", 23), "the imported opsets"),
        (lambda m: m.graph.outputs.clear(), "output y is gone"),
        (
            lambda m: setattr(m.graph.initializers["two"], "const_value", ir.tensor([3.0])),
            "initializer two",
        ),
        (lambda m: m.graph.initializers["weight"].const_value.numpy().fill(7), "initializer"),
    ],
)
def test_a_pass_that_changes_the_model_and_returns_0_is_stopped(
    edit: Callable[[ir.Model], object], place: str
) -> None:
    model = parse(WEIGHT)
    large = ir.tensor(np.ones((300, 4), np.float32), name="weight")
    model.graph.register_initializer(ir.Value(name="weight", const_value=large))
    pipeline = Pipeline((Silent(look), Silent(edit)))
    if not place:  # an equal attribute in the place of another is no change
        pipeline.run(model)
        return
    with pytest.raises(CheckError) as caught:
        pipeline.run(model)
    assert "silent changed the model and returned 0: the first thing that differs: " in str(
        caught.value
    )
    assert place in caught.value.why


def test_notes_on_types_may_be_added_by_a_pass_that_returns_0() -> None:
    Pipeline((Silent(infer_model),)).run(parse(WEIGHT))


def test_an_external_weight_may_be_read_by_a_pass_that_returns_0(tmp_path: Path) -> None:
    model = parse(WEIGHT)
    large = ir.tensor(np.ones((300, 4), np.float32), name="weight")
    model.graph.register_initializer(ir.Value(name="weight", const_value=large))
    ir.save(model, tmp_path / "m.onnx", external="m.data")
    read = Silent(lambda m: m.graph.initializers["weight"].const_value.numpy().sum())
    Pipeline((read,)).run(ir.load(tmp_path / "m.onnx"))


def test_the_first_thing_that_differs_is_named() -> None:
    model = parse(WEIGHT)
    before = fingerprint(model)
    assert before.difference(fingerprint(model)) == ""
    model.graph.append(ir.node("Abs", [model.graph.inputs[0]], name="new"))
    assert before.difference(fingerprint(model)) == "Abs new, where output y was"
    assert before.difference(fingerprint(parse(WEIGHT))) == ""  # other objects, the same model


@pytest.mark.parametrize("name", ["fold-constants", "eliminate-common-subexpressions"])
def test_what_passes_do_inside_a_branch_is_counted(name: str) -> None:
    """Both once returned 0 for it."""
    model = parse("""
        <ir_version: 11, opset_import: ["" : 24]>
        g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <
                then_branch = a () => (float[2] p) <float e = {2.0}, float f = {2.0}> {
                    one = Constant <value = float {1.0}> ()
                    l = Add (x, e)  r = Add (one, f)  p = Mul (l, r)
                },
                else_branch = b () => (float[2] q) { q = Neg (x) }
            >
        }""")
    (run,) = make_pipeline(name).run(model).passes
    assert run.rewrites > 0
