"""name-dims: one name for one size, whatever the exporter called it."""

import re

import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.values import dims
from omforge.passes.name_dims import NameDims
from omforge.rewriting.events import events
from omforge.testing import parse
from tests.passes.blocks import Block
from tests.passes.cache_layouts import laid_out

STRANGE = {"batch": "s0", "seq": "s1", "past": "s2", "total": "s3"}


def strange(block: Block) -> str:
    """The text with names that tell nothing."""
    text = block.text()
    head, _, body = text.partition("{\n")
    for name, other in STRANGE.items():
        head = re.sub(rf"\b{name}\b", other, head)
    return head + "{\n" + body


def shapes(model: ir.Model) -> dict[str | None, str]:
    return {v.name: str(v.shape) for v in (*model.graph.inputs, *model.graph.outputs)}


def test_names_every_input_and_output() -> None:
    model = parse(strange(Block()))
    assert NameDims().run(model) == 5
    assert shapes(model) == {
        "input_ids": "[batch,seq]",
        "attention_mask": "[batch,past + seq]",
        "position_ids": "[batch,seq]",
        "past_key": "[batch,2,past,4]",
        "past_value": "[batch,2,past,4]",
        "logits": "[batch,seq,16]",
        "present_key": "[batch,2,past + seq,4]",
        "present_value": "[batch,2,past + seq,4]",
    }


def test_finds_nothing_in_a_second_run() -> None:
    model = parse(strange(Block()))
    NameDims().run(model)
    assert NameDims().run(model) == 0


def test_makes_shapes_of_different_inputs_comparable() -> None:
    model = parse(strange(Block()))
    NameDims().run(model)
    infer_model(model)
    values = {v.name: v for node in model.graph for v in node.outputs}
    bias, scores = dims(values["bias"]), dims(values["scores"])
    assert bias is not None
    assert scores is not None
    assert (bias[0], *bias[2:]) == (scores[0], *scores[2:])


@pytest.mark.parametrize(
    ("block", "mask", "cache"),
    [
        (Block(batch="2"), "[2,past + seq]", "[2,2,past,4]"),
        (Block(seq="1"), "[batch,past + 1]", "[batch,2,past,4]"),
        (Block(past="7"), "[batch,seq + 7]", "[batch,2,7,4]"),
        (Block(batch="1", seq="1", past="7"), "[1,8]", "[1,2,7,4]"),
    ],
)
def test_numbers_stay(block: Block, mask: str, cache: str) -> None:
    model = parse(block.text())
    NameDims().run(model)
    found = shapes(model)
    assert found["attention_mask"] == mask
    assert found["past_key"] == cache


def test_without_a_cache_the_mask_is_as_long_as_the_tokens() -> None:
    model = parse(strange(Block(cache=False)))
    NameDims().run(model)
    assert shapes(model)["attention_mask"] == "[batch,seq]"


def test_numbers_written_as_text_become_numbers() -> None:
    """The dynamo exporter writes some fixed sizes as names such as "16"."""
    model = parse(Block().text())
    cache = next(v for v in model.graph.inputs if v.name == "past_key")
    cache.shape = ir.Shape(["batch", "2", "past", "4"])
    assert NameDims().run(model) > 0
    assert [dim for dim in cache.shape if isinstance(dim, int)] == [2, 4]


def test_a_graph_that_is_no_language_model_keeps_its_names() -> None:
    text = '<ir_version: 11, opset_import: ["" : 24]> g (float[N] x) => (float[N] y) {y = Neg (x)}'
    model = parse(text)
    assert NameDims().run(model) == 0
    assert "no causal LM" in events(model)[0].reason


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        ("P B K D", "[past,batch,2,4]"),
        ("B P K D", "[batch,past,2,4]"),
        ("B K D P", "[batch,2,4,past]"),
        ("BK D P", "[2*batch,4,past]"),
    ],
)
def test_an_axis_is_the_past_where_the_graph_appends(keys: str, shape: str) -> None:
    """Nothing is assumed from the place of an axis: ChatGLM, Qwen-1 and BLOOM differ."""
    text = laid_out(keys, "B K P D")
    head, _, body = text.partition("{\n")
    for name, other in (*STRANGE.items(), ("rows", "s4")):
        head = re.sub(rf"\b{name}\b", other, head)
    model = parse(head + "{\n" + body)
    NameDims().run(model)
    found = shapes(model)
    assert found["past_key"] == shape
    assert found["past_value"] == "[batch,2,past,4]"
    assert found["attention_mask"] == "[batch,past + seq]"


def test_an_axis_of_which_nothing_is_known_keeps_its_own_name() -> None:
    encoder = "float[batch, words, 8] encoder, float[1, past, 8] other, float[1, frames, 8] third"
    text = strange(Block()).replace(
        "int64[s0, s1] position_ids", f"{encoder}, int64[s0, s1] position_ids"
    )
    model = parse(text)
    NameDims().run(model)
    found = shapes(model)
    # An exporter's name that is one of ours, for an axis that is not known to be that.
    assert found["encoder"] == "[own_batch,words,8]"
    assert found["other"] == "[1,own_past,8]"
    assert found["third"] == "[1,frames,8]"
    # What the exporter calls like an axis that is known is that axis.
    again = parse(text.replace("float[batch, words, 8]", "float[s0, words, 8]"))
    NameDims().run(again)
    assert shapes(again)["encoder"] == "[batch,words,8]"


def test_a_size_that_the_graph_fixes_is_a_number() -> None:
    model = parse(
        Block()
        .text()
        .replace("float[batch, 2, past, 4] past_key", "float[batch, heads, past, size] past_key")
    )
    NameDims().run(model)
    assert shapes(model)["past_key"] == "[batch,2,past,4]"


def test_numbers_of_tokens_have_the_tokens_names() -> None:
    """token_type_ids look up rows as tokens do; what does not keeps its own names."""
    zeros = "0, " * 39 + "0"
    text = """<ir_version: 11, opset_import: ["" : 24]>
    g (int64[b, s] input_ids, int64[b2, s2] token_type_ids, int64[n, m] other)
      => (float[b, s, 1] y, int64[n, m] z)
    <float[40, 1] table = {ZEROS}, float[2, 1] few = {0, 0}> {
        x = Gather (table, input_ids)
        k = Gather (few, token_type_ids)
        y = Add (x, k)
        z = Neg (other)
    }"""
    model = parse(text.replace("ZEROS", zeros))
    NameDims().run(model)
    shapes = {v.name: [str(dim) for dim in dims(v) or ()] for v in model.graph.inputs}
    assert shapes["input_ids"] == shapes["token_type_ids"] == ["batch", "seq"]
    assert shapes["other"] == ["n", "m"]


def test_the_state_of_a_convolution_is_no_cache_that_grows() -> None:
    """It is joined with the tokens too, and has a fixed size; the mask is as long as the cache."""
    state = "float[s0, 8, 4] state"
    block = Block(
        edits=(
            ("float[batch, 2, past, 4] past_key", f"{state}, float[batch, 2, past, 4] past_key"),
            ("x = Gather (table, input_ids)",
             "x_a = Gather (table, input_ids) x_t = Transpose <perm = [0, 2, 1]> (x_a)"
             " wide = Concat <axis = 2> (state, x_t)"
             " next_state = Slice (wide, i_m4, i_9999, i_2) old = Slice (wide, i_0, i_m4, i_2)"
             " x = Transpose <perm = [0, 2, 1]> (old)"),
        ),
        outputs=("float[s0, 8, 4] next_state",),
    )  # fmt: skip
    text = strange(block).replace(
        "<float[16, 8] table",
        "<int64[1] i_m4 = {-4}, int64[1] i_9999 = {9999}, int64[1] i_0 = {0}, float[16, 8] table",
    )
    model = parse(text)
    NameDims().run(model)
    found = shapes(model)
    assert found["attention_mask"] == "[batch,past + seq]"
    assert found["past_key"] == "[batch,2,past,4]"
    assert found["state"] == "[batch,8,4]"


@pytest.mark.parametrize("rows", ["batch1", "all"])
def test_an_axis_that_a_reshape_splits_is_known_by_its_elements(rows: str) -> None:
    """[B*K, P, D] is split on its way to the join; by -1, or by the batch of the tokens."""
    split = (
        "heads = Constant <value_ints = [2]> () size = Constant <value_ints = [4]> ()"
        " all = Constant <value_ints = [-1]> ()"
        f" parts = Concat <axis = 0> ({rows}, heads, past1, size)"
        " whole_key = Reshape (past_key, parts)"
    )
    text = (
        Block().text().replace("float[batch, 2, past, 4] past_key", "float[rows, past, 4] past_key")
    )
    text = text.replace(
        "Shape <start = 2, end = 3> (past_key)", "Shape <start = 1, end = 2> (past_key)"
    )
    text = text.replace(
        "present_key = Concat <axis = 2> (past_key",
        f"{split} present_key = Concat <axis = 2> (whole_key",
    )
    model = parse(text)
    NameDims().run(model)
    assert shapes(model)["past_key"] == "[2*batch,past,4]"
