"""context-bounds: how long a text may be for the tables and the choices in a graph."""

import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.passes import make_pipeline
from omforge.recognition.config import ModelConfig
from omforge.recognition.lengths.bounds import Bound, config_bounds, find_bounds
from omforge.testing import parse
from tests.passes import lengths
from tests.passes.blocks import LONGEST, Block


@pytest.mark.parametrize(
    ("body", "tokens", "why"),
    [
        (lengths.LOOKED_UP, 8, "the table places in the graph has 8 rows"),
        (lengths.SLICED, 8, "the table places in the graph has 8 rows"),
        (
            lengths.BEHIND_TWO,
            6,
            "the table places in the graph has 8 rows, and the first token has row 2",
        ),
    ],
)
def test_a_table_ends_with_its_rows(body: str, tokens: int, why: str) -> None:
    assert find_bounds(lengths.model(body), 100) == (Bound(tokens, why),)
    assert find_bounds(lengths.model(body), tokens) == ()


def test_a_step_of_one_token_ends_with_the_table_too() -> None:
    model = lengths.model(lengths.LOOKED_UP)
    for value in model.graph.inputs[0], model.graph.inputs[2]:
        value.shape = ir.Shape(["batch", 1])
    infer_model(model)
    assert [bound.tokens for bound in find_bounds(model, 100)] == [8]


def test_what_is_as_long_as_the_text_is_no_table_that_ends() -> None:
    """A mask of all rows in one, looked up row by row, in a step of one token."""
    model = lengths.model(lengths.FLATTENED)
    assert find_bounds(model, 100) == ()
    for value in model.graph.inputs[0], model.graph.inputs[2]:
        value.shape = ir.Shape(["batch", 1])
    infer_model(model)
    assert find_bounds(model, 100) == ()


@pytest.mark.parametrize(
    ("block", "table"),
    [
        (Block(rotary="half", tables="gathered"), "cos_table in the graph has 32 rows"),
        (Block(visible="table"), "square in the graph is [1, 1, 32, 32]"),
        (Block(visible="table", cache=False), "square in the graph is [1, 1, 32, 32]"),
    ],
    ids=["cosines", "mask", "mask without a cache"],
)
def test_a_block_ends_with_its_tables(block: Block, table: str) -> None:
    model = parse(block.text())
    make_pipeline("canonicalize").run(model, ())
    assert find_bounds(model, 100) == (Bound(LONGEST, f"the table {table}"),)


@pytest.mark.parametrize("visible", ["causal", "trilu", "window", "alibi"])
def test_what_is_computed_has_no_end(visible: str) -> None:
    model = parse(Block(visible=visible, rotary="half").text())
    make_pipeline("canonicalize").run(model, ())
    assert find_bounds(model, 300) == ()


def test_the_kind_of_a_token_is_no_position() -> None:
    text = lengths.TEXT.replace("position_ids", "token_type_ids")
    model = parse(text.replace("BODY", "place = Gather (places, token_type_ids)"))
    assert find_bounds(model, 100) == ()


def test_a_choice_bounds_what_the_tables_leave() -> None:
    body = lengths.BRANCHES + lengths.TURNED.replace("place =", "turn =")
    body += "row = Gather (places, position_ids) place = Mul (row, turn)"
    assert [bound.tokens for bound in find_bounds(lengths.model(body), 100)] == [6, 8]


def test_a_configuration_is_a_bound() -> None:
    assert config_bounds(None) == config_bounds(ModelConfig()) == ()
    told = ModelConfig(max_positions=9, positions_source="config.json says n_ctx = 9")
    assert config_bounds(told) == (Bound(9, "config.json says n_ctx = 9"),)
