"""Pipelines: the text form, its errors, and what a run reports."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from omforge import ir
from omforge.ir.errors import InputError
from omforge.rewriting.base import Pass
from omforge.rewriting.pass_error import PassError
from omforge.rewriting.pipeline import Pipeline
from omforge.rewriting.pipeline_text import parse_pipeline

MODEL = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N] x) => (float[N] y) { a = Neg (x) b = Neg (a) c = Neg (b) y = Neg (c) }"""


@dataclass(frozen=True)
class Plain(Pass):
    """Do nothing.

    At some length.
    """

    name: ClassVar[str] = "plain"

    def run(self, model: ir.Model) -> int:
        return 0


@dataclass(frozen=True)
class BucketShapes(Pass):
    """Have options of every type."""

    name: ClassVar[str] = "bucket-shapes"
    context: int
    prefill: tuple[int, ...] = (1,)
    scale: float = 1.0
    pad: bool = False
    layout: Literal["stacked", "per-layer"] = "stacked"
    prefix: str = ""
    limit: int | None = None

    def run(self, model: ir.Model) -> int:
        return 0


class DropNegPairs(Pass):
    name = "drop-neg-pairs"

    def run(self, model: ir.Model) -> int:
        graph = model.graph
        first, second, third, _ = graph
        third.replace_input_with(0, first.inputs[0])
        graph.remove([first, second], safe=True)
        return 1


class Broken(Pass):
    """Fail."""

    name = "broken"

    def run(self, model: ir.Model) -> int:
        raise ValueError("a bug")


REGISTRY = {step.name: step for step in (Plain, BucketShapes, DropNegPairs, Broken)}
PIPELINES = {
    "twice": "plain,plain",
    "nested": "twice,bucket-shapes{context=1}",
    "loop": "plain,loop",
}


def parse(text: str) -> Pipeline:
    return parse_pipeline(text, REGISTRY, PIPELINES)


def test_options_are_typed_by_fields() -> None:
    text = (
        "bucket-shapes{context=2048 prefill=1,128 scale=0.5 pad=true layout=per-layer"
        ' prefix="a b" limit=3}'
    )
    assert parse(text).passes == (BucketShapes(2048, (1, 128), 0.5, True, "per-layer", "a b", 3),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "plain,plain",
        "bucket-shapes{context=8}",
        "bucket-shapes{context=8 prefill=1,2,3 pad=true layout=per-layer prefix=v limit=4}",
        'plain,bucket-shapes{context=8 prefix="a, {b} c"},plain',
    ],
)
def test_text_round_trips(text: str) -> None:
    assert str(parse(text)) == text


def test_defaults_are_left_out_and_blanks_do_not_matter() -> None:
    text = " plain ,\n bucket-shapes{ context=8  pad=false }"
    assert str(parse(text)) == "plain,bucket-shapes{context=8}"


def test_named_pipelines_expand_in_place() -> None:
    assert str(parse("nested,plain")) == "plain,plain,bucket-shapes{context=1},plain"


ERRORS = {
    "plane": "column 1: there is no pass 'plane'. Did you mean 'plain'?",
    "plain,,plain": "column 7: a pass name is missing",
    "plain plain": "column 7: 'p' follows a pass. Write a comma between passes",
    "plain{deep=1}": "column 7: plain has no option 'deep'. Leave the braces out",
    "bucket-shapes": "column 1: bucket-shapes needs context. Write bucket-shapes{context=INT",
    "bucket-shapes{contxt=1}": "has no option 'contxt'. Did you mean 'context'? Options: ",
    "bucket-shapes{context=big}": "column 23: 'big' is no value for 'context'. Write context=INT",
    "bucket-shapes{context=1 prefill=1,x}": "is no value for 'prefill'. Write prefill=INT,INT,...",
    "bucket-shapes{context=1 pad=yes}": "'yes' is no value for 'pad'. Write pad=true|false",
    "bucket-shapes{context=1 layout=x}": "Write layout=stacked|per-layer",
    "bucket-shapes{context=1 context=2}": "column 25: option 'context' is given twice",
    "bucket-shapes{context}": "column 22: option 'context' has no value",
    "bucket-shapes{context=1": "column 14: this brace is not closed",
    'bucket-shapes{prefix="a}': "column 22: this quote is not closed",
    "twice{x=1}": "column 6: 'twice' is a pipeline. Give options to the passes in it",
    "loop": "pipeline 'loop' contains itself. Break the cycle loop -> loop",
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_name_the_place_and_the_remedy(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text)
    assert ERRORS[text] in str(caught.value)


def test_a_summary_is_the_first_line() -> None:
    assert Plain.summary() == "Do nothing."
    # Without a docstring of its own, a pass is what its module says.
    assert DropNegPairs.summary() == "Pipelines: the text form, its errors, and what a run reports."


def test_a_run_reports_each_pass() -> None:
    result = parse("plain,drop-neg-pairs").run(ir.from_onnx_text(MODEL))
    plain, drop = result.passes
    assert (plain.name, plain.changed, plain.nodes_before, plain.nodes_after) == (
        "plain",
        False,
        4,
        4,
    )
    assert (drop.index, drop.rewrites, drop.nodes_before, drop.nodes_after) == (2, 1, 4, 2)
    assert drop.seconds > 0
    assert drop.max_abs_diff is None
    assert result.rewrites == 1


def test_a_failure_says_in_which_pass() -> None:
    with pytest.raises(PassError) as caught:
        parse("plain,broken").run(ir.from_onnx_text(MODEL))
    assert caught.value.what == "the pass broken failed with ValueError: a bug"
    assert f"that is a fault of {__name__}:Broken, at test_pipeline.py:" in caught.value.why
    assert "Mend the pass" in caught.value.next_step
    assert isinstance(caught.value.__cause__, ValueError)
    assert caught.value.__notes__ == ["in pass 2 of 2, broken"]


@pytest.mark.parametrize("error", [ir.CheckError("no"), FileNotFoundError("no"), MemoryError("no")])
def test_what_says_by_itself_what_is_wrong_goes_up_as_it_is(error: Exception) -> None:
    class Says(Pass):
        name = "says"

        def run(self, model: ir.Model) -> int:
            raise error

    with pytest.raises(type(error), match="no"):
        Pipeline((Says(),)).run(ir.from_onnx_text(MODEL))
