"""explain: the misses of a whole model, grouped over layers."""

from omforge.recognition.coverage import Coverage, Covered
from omforge.recognition.explain import explain, layer_of
from omforge.rewriting.events import Event

COVERAGE = Coverage({"attention": Covered(1, 4), "rotary": Covered(8, 8)}, ("a window is lost",))
EVENTS = [
    Event("fuse-attention", f"Softmax n{i} in model.layers.{i}", f"mask_{i} has a second reader")
    for i in range(3)
] + [Event("name-dims", "input_ids", "odd")]


def test_the_same_miss_in_several_layers_is_one() -> None:
    found = explain(COVERAGE, EVENTS)
    assert [(miss.pass_name, miss.layers) for miss in found.misses] == [
        ("fuse-attention", (0, 1, 2)),
        ("name-dims", ()),
    ]


def test_lines_name_the_kind_the_layers_the_reason_and_the_place() -> None:
    assert explain(COVERAGE, EVENTS).lines() == [
        "attention: 1 of 4 raised",
        "  layers 0-2: mask_0 has a second reader; at Softmax n0 in model.layers.0 (and 2 more)",
        "rotary: 8 of 8 raised",
        "a window is lost",
        "besides:",
        "  name-dims: input_ids: odd; at input_ids",
    ]


def test_a_layer_that_differs_stands_out() -> None:
    odd = Event("fuse-attention", "Softmax n9 in model.layers.9", "the scale is no number")
    found = explain(COVERAGE, [*EVENTS, odd]).misses
    assert [miss.layers for miss in found[:3]] == [(0, 1, 2), (), (9,)]


def test_filters() -> None:
    assert [m.layers for m in explain(COVERAGE, EVENTS, layer=1).misses] == [(1,)]
    assert len(explain(COVERAGE, EVENTS, pass_name="name-dims").misses) == 1
    assert [m.layers for m in explain(COVERAGE, EVENTS, at="n2").misses] == [(2,)]


def test_layers_are_read_off_module_paths_of_every_exporter() -> None:
    for where, layer in (
        ("MatMul /model/layers.13/mlp/MatMul", 13),
        ("Add node_add_3 in transformer.h.7.attn", 7),
        ("Softmax in gpt_neox.layers.0.attention", 0),
        ("Softmax softmax_3", None),
    ):
        assert layer_of(Event("p", where, "why")) == layer


def test_json_holds_the_same() -> None:
    told = explain(COVERAGE, EVENTS).to_json()
    assert told["coverage"]["attention"]["found"] == 1
    assert told["misses"][0]["layers"] == [0, 1, 2]
