"""Tables of rotary embeddings: shared by layers, one number a pair, where they run over tokens."""

import dataclasses

import pytest

from omforge import ir
from omforge.recognition.interface import find_interface
from omforge.recognition.rotary.tables import Tables, Wanted, check_layout
from omforge.rewriting.events import events
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names
from tests.passes.blocks import Block, named

ROTARY = Block(rotary="half", size=8, visible="", padding=False)


def wanted(model: ir.Model, **changes: object) -> Wanted:
    values = {value.name: value for node in model.graph for value in node.outputs}
    made = Wanted(values["cos"], values["sin"], values["q4"], True, "half", False)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def made(model: ir.Model, *asked: Wanted) -> list[tuple[ir.Value, ir.Value]]:
    tables = Tables(model, find_interface(model), Names(model), "test")
    root = next(node for node in model.graph if node.outputs[0].name == "q4_cos")
    return [tables.get(root, one) for one in asked]


def test_layers_share_them() -> None:
    model = named(ROTARY)
    values = {value.name: value for node in model.graph for value in node.outputs}
    first, second = made(model, wanted(model), wanted(model, meets=values["k4"]))
    assert first == second
    assert not events(model)


def test_the_other_way_round_has_tables_of_its_own() -> None:
    model = named(ROTARY)
    first, second = made(model, wanted(model), wanted(model, reverse=True))
    assert first != second
    assert [value.producer().op_type for value in second] == ["Cos", "Sin"]  # type: ignore[union-attr]


def test_what_is_no_rotation_is_cut_in_half_and_told() -> None:
    model = named(dataclasses.replace(ROTARY, tables="gathered"))
    ((cos, sin),) = made(model, wanted(model, reverse=True))
    assert [value.producer().op_type for value in (cos, sin)] == ["Slice", "Neg"]  # type: ignore[union-attr]
    (event,) = events(model)
    assert "its table is kept as it stands" in event.reason


def test_halves_must_hold_the_same() -> None:
    model = named(dataclasses.replace(ROTARY, tables="gathered"))
    with pytest.raises(NoMatch, match="the two elements of a rotated pair meet different numbers"):
        made(model, wanted(model, pairs="interleaved"))


@pytest.mark.parametrize(
    "changes",
    [{"by_head": False}, {"meets": "scores"}, {"cos": "cos_b"}, {"cos": "position"}],
    ids=["heads behind tokens", "other widths", "no axis for heads", "one number a token"],
)
def test_tables_run_over_tokens_and_width(changes: dict[str, object]) -> None:
    model = named(ROTARY)
    values = {value.name: value for node in model.graph for value in node.outputs}
    found = {k: values.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(NoMatch, match="does not run over"):
        check_layout(wanted(model, **found))


def test_a_table_is_of_the_dtype_of_what_it_meets() -> None:
    changes = {"q4_cos = Mul (q4, cos)": (
        "cos_h = Cast <to = 10> (cos) cos_hf = Cast <to = 1> (cos_h) q4_cos = Mul (q4, cos_hf)")}  # fmt: skip
    model = named(dataclasses.replace(ROTARY, edits=tuple(changes.items())))
    values = {value.name: value for node in model.graph for value in node.outputs}
    with pytest.raises(NoMatch, match="a rotary table of FLOAT16 meets FLOAT"):
        check_layout(wanted(model, cos=values["cos_h"]))
