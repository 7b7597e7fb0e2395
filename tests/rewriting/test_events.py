"""Events: what passes tell, once each and in words that name the place."""

import logging

import pytest

from omforge import ir
from omforge.rewriting.events import Event, events, grouped, record

TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N] x) => (float[N] y) { h = Neg (x) y = Exp (h) }"""


def test_a_node_and_a_value_are_named() -> None:
    model = ir.from_onnx_text(TEXT)
    neg = model.graph[0]
    neg.name = "/model/layers.0/mlp/Neg"
    record(model, "some-pass", neg, "of its colour")
    record(model, "some-pass", neg.outputs[0], "of its length")
    record(model, "some-pass", model.graph.inputs[0], "of its smell")
    assert events(model) == (
        Event("some-pass", "Neg /model/layers.0/mlp/Neg", "of its colour"),
        Event("some-pass", "h, which Neg /model/layers.0/mlp/Neg makes", "of its length"),
        Event("some-pass", "x", "of its smell"),
    )


def test_the_same_event_is_kept_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = ir.from_onnx_text(TEXT)
    with caplog.at_level(logging.INFO, logger="omforge"):
        record(model, "some-pass", "layer 3", "of its colour")
        record(model, "some-pass", "layer 3", "of its colour")
    assert len(events(model)) == 1
    assert caplog.messages == ["some-pass: left layer 3 alone: of its colour"]


def test_a_model_without_events_has_none() -> None:
    assert events(ir.from_onnx_text(TEXT)) == ()


def test_equal_events_are_one_line_with_the_first_place_and_a_count() -> None:
    """Equal but for numbers, in which names differ from layer to layer."""
    told = [
        *(Event("a-pass", f"Add {n}", f"layers.{n} has another shape") for n in range(3)),
        Event("a-pass", "Mul 0", "of its colour"),
        Event("b-pass", "Add 0", "layers.0 has another shape"),
        Event("a-pass", "Add 3", "layers.3 has another shape", done=True),
    ]
    assert grouped(told) == [
        "a-pass: left Add 0 alone: layers.0 has another shape (and 2 more)",
        "a-pass: left Mul 0 alone: of its colour",
        "b-pass: left Add 0 alone: layers.0 has another shape",
        "a-pass: Add 3: layers.3 has another shape",
    ]
