"""Assertions for tests of passes: ONNX text in, ONNX text out, the same numbers."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from omforge import ir
from omforge.ir import numerics
from omforge.ir.infer import infer_model
from omforge.ir.verify import check
from omforge.rewriting.base import Pass
from omforge.rewriting.events import events
from omforge.rewriting.rewrite import RewritePass, closest_attempts
from omforge.testing.feeds import several_feeds
from omforge.testing.outline import outline

if TYPE_CHECKING:
    import pytest

_ATTEMPTS = 3
"""Of those that came closest, what is shown."""

Feeds = Mapping[str, npt.NDArray[Any]]


def parse(text: str) -> ir.Model:
    """Return the model of an ONNX text, with the shapes of all values."""
    model = ir.from_onnx_text(text)
    infer_model(model)
    return model


def assert_rewrites(
    step: Pass,
    before: str,
    after: str,
    *,
    feeds: Sequence[Feeds] | None = None,
    allowed: numerics.Tolerance | None = None,
) -> ir.Model:
    """Assert that a pass makes one model of another.

    Checked: the graph is that of `after` up to the names inside it; inputs and outputs are as they
    were; the model is valid; a second run finds nothing; the numbers are the same.

    Args:
        step: The pass.
        before: ONNX text.
        after: ONNX text; its constants count by content, and attributes with their default may be
            left out.
        feeds: Inputs to compare on; `several_feeds` by default.
        allowed: The tolerance, instead of the table's for each output's dtype.

    Returns:
        The rewritten model.
    """
    original, model, expected = parse(before), parse(before), parse(after)
    rewrites = step.run(model)
    assert rewrites > 0, f"{step} found nothing to rewrite{_closest(step, model)}"
    if not step.changes_interface:
        _assert_same_interface(original, model)
    _assert_same_outline(model, expected)
    check(model)
    again = step.run(model)
    assert again == 0, f"{step} found {again} more rewrites in a second run"
    if not step.changes_interface:
        assert_same_numbers(original, model, feeds, allowed)
    return model


def _closest(step: Pass, model: ir.Model) -> str:
    """How far it came: what it declined, and where its pattern ended."""
    told = [str(event) for event in events(model) if event.pass_name == step.name]
    if isinstance(step, RewritePass):
        told += closest_attempts(step, model)[:_ATTEMPTS]
    return "".join(f"\n  {line}" for line in dict.fromkeys(told))


def assert_leaves_alone(
    step: Pass, text: str, reason: str, caplog: "pytest.LogCaptureFixture"
) -> None:
    """Assert that a pass changes nothing, and says why at INFO.

    Args:
        step: The pass.
        text: ONNX text.
        reason: A part of the log; "" if there is nothing to tell.
        caplog: pytest's fixture.
    """
    model = parse(text)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with caplog.at_level(logging.INFO, logger="omforge"):
        rewrites = step.run(model)
    assert rewrites == 0, f"{step} rewrote:\n" + "\n".join(outline(model))
    after = ir.to_proto(model).SerializeToString(deterministic=True)
    assert after == before, f"{step} says that it rewrote nothing, and changed the model"
    assert reason in caplog.text


def assert_same_numbers(
    before: ir.Model,
    after: ir.Model,
    feeds: Sequence[Feeds] | None = None,
    allowed: numerics.Tolerance | None = None,
) -> None:
    """Assert that two models return the same on ONNX Runtime.

    Args:
        before: The reference.
        after: The model under test.
        feeds: Inputs for both; `several_feeds` by default.
        allowed: The tolerance, instead of the table's for each output's dtype.
    """
    for given in several_feeds(before) if feeds is None else feeds:
        expected, actual = numerics.run(before, given), numerics.run(after, given)
        assert list(actual) == list(expected)
        for name, reference in expected.items():
            limit = allowed or numerics.tolerance(reference.dtype.name)
            difference = numerics.max_abs_diff(actual[name], reference)
            assert actual[name].dtype == reference.dtype, f"{name} is now {actual[name].dtype}"
            assert numerics.within(actual[name], reference, limit), (
                f"{name} differs by {difference:g}; atol {limit.atol:g}, rtol {limit.rtol:g}"
            )


def _assert_same_outline(model: ir.Model, expected: ir.Model) -> None:
    got, wanted = outline(model), outline(expected)
    difference = "\n".join(difflib.unified_diff(wanted, got, "expected", "got", lineterm="", n=99))
    assert got == wanted, f"\n{difference}"


def _assert_same_interface(before: ir.Model, after: ir.Model) -> None:
    for kind in ("inputs", "outputs"):
        was, now = ([_signature(v) for v in getattr(m.graph, kind)] for m in (before, after))
        assert now == was, f"{kind} were {was} and are {now}"


def _signature(value: ir.Value) -> tuple[str | None, str, str]:
    return value.name, str(value.dtype), str(value.shape)
