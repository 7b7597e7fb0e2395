"""take-branches: an If gives way to the branch that is taken."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.passes.take_branches import CacheFlag, TakeBranches, cache_flag
from omforge.rewriting.events import events
from omforge.testing import parse

TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 2] x, bool[1] flag, float[N, P, 2] past) => (float[N, 2] y, float[N, 2] z)
<float[2] shared = {1, 2}> {
    asked = Squeeze (flag)
    y, z = If (asked) <
        then_branch = cached () => (float[N, 2] a, float[N, 2] b)
            <float[2] own = {5, 6}> {
            old = ReduceSum <keepdims = 0> (past)
            s = Add (x, shared)
            t = Add (s, own)
            a = Add (t, old)
            b = Identity (a)
        },
        else_branch = plain () => (float[N, 2] a, float[N, 2] b) {
            s = Mul (x, shared)
            a = Neg (s)
            b = Add (a, x)
        }
    >
}"""
X = np.array([[1, 2]], np.float32)
PAST = np.ones((1, 3, 2), np.float32)


@pytest.mark.parametrize("cached", [True, False])
def test_the_flag_is_what_says_whether_there_is_a_past(cached: bool) -> None:
    before, after = parse(TEXT), parse(TEXT)
    assert TakeBranches(cached).run(after) == 1
    ir.check(after)
    assert "If" not in {node.op_type for node in after.graph}
    assert [v.name for v in after.graph.inputs] == (["x", "past"] if cached else ["x"])
    assert cache_flag(after) == CacheFlag("flag", cached=True)
    expected = numerics.run(before, {"x": X, "past": PAST, "flag": np.array([cached])})
    found = numerics.run(after, {"x": X, "past": PAST})
    assert list(found) == ["y", "z"]
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("value", [0, 1])
def test_a_constant_takes_its_branch(value: int) -> None:
    text = TEXT.replace("asked = Squeeze (flag)", "").replace(
        "<float[2] shared = {1, 2}>", f"<float[2] shared = {{1, 2}}, bool asked = {{{value}}}>"
    )
    before, after = parse(text), parse(text)
    assert TakeBranches().run(after) == 1
    ir.check(after)
    assert cache_flag(after) is None
    feeds = {"x": X, "past": PAST, "flag": np.array([True])}
    expected, found = numerics.run(before, feeds), numerics.run(after, feeds)
    np.testing.assert_array_equal(found["z"], expected["z"])


def test_names_that_both_graphs_have_stay_apart() -> None:
    text = TEXT.replace(
        "asked = Squeeze (flag)", "asked = Squeeze (flag) s = Neg (x) own = Abs (s)"
    )
    text = text.replace("float[N, 2] z)", "float[N, 2] z, float[N, 2] w)", 1)
    text = text.rstrip("}").rstrip() + "\n w = Neg (own) }"
    model = parse(text)
    assert TakeBranches().run(model) == 1
    ir.check(model)
    found = numerics.run(model, {"x": X, "past": PAST})
    np.testing.assert_array_equal(found["y"], X + [1, 2] + [5, 6] + 6)
    np.testing.assert_array_equal(found["w"], -X)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Neither branch reads the cache; the condition is computed.
        ("ReduceSum <keepdims = 0> (past)", "ReduceSum <keepdims = 0> (x)"),
        ("asked = Squeeze (flag)", "n = ReduceSum <keepdims = 0> (x) asked = Cast <to = 9> (n)"),
    ],
)
def test_a_choice_of_another_kind_stays(old: str, new: str) -> None:
    model = parse(TEXT.replace(old, new))
    assert TakeBranches().run(model) == 0
    assert "If" in {node.op_type for node in model.graph}
    (event,) = events(model)
    assert "neither constant" in event.reason
