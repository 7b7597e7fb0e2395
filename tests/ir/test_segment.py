"""A model run a few nodes at a time gives what it gives at once."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir import segment
from omforge.ir.numerics import run
from omforge.ir.segment import Walk
from tests.quantization.weights import weighted

TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[B, 4] x, float[4, 4] a, float[4, 4] b) => (float[B, 4] y) {
    h = MatMul (x, a)
    left, right = Split <axis = 1, num_outputs = 2> (h)
    turned = Concat <axis = 1> (right, left)
    m = MatMul (turned, b)
    y = Add (m, h)
}"""
X = [np.random.default_rng(i).normal(size=(i + 1, 4)).astype(np.float32) for i in range(2)]


def model() -> ir.Model:
    return weighted(ir.from_onnx_text(TEXT), 1)


def values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(v.name): v for node in model.graph for v in node.outputs}


@pytest.mark.parametrize("weights", [1, 70, 1 << 20])
def test_every_stop_gives_what_the_whole_gives(
    weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many bytes of weights are run at once."""
    monkeypatch.setattr(segment, "_WEIGHTS", weights)
    whole = model()
    named = values(whole)
    walk = Walk(whole, [{"x": x} for x in X])
    probe = model()
    probe.graph.outputs[:] = [values(probe)[name] for name in ("h", "turned", "y")]
    expected = [run(probe, {"x": x}) for x in X]
    for name in ("h", "turned", "y"):
        for found, right in zip(walk.advance(named[name]), expected, strict=True):
            np.testing.assert_allclose(found, right[name], rtol=1e-5)


def test_weights_may_be_replaced_on_the_way() -> None:
    whole = model()
    named = values(whole)
    walk = Walk(whole, [{"x": X[1]}])
    (h,) = walk.advance(named["h"])
    zeros = np.zeros((4, 4), np.float32)
    (y,) = walk.advance(named["y"], {whole.graph.initializers["b"]: zeros})
    np.testing.assert_array_equal(y, h)


def test_what_nobody_reads_any_more_is_dropped() -> None:
    whole = model()
    named = values(whole)
    walk = Walk(whole, [{"x": X[0]}])
    walk.advance(named["turned"])
    assert set(walk._envs[0]) == {"h", "turned"}
    walk.advance(named["m"])
    assert set(walk._envs[0]) == {"h", "m"}


def test_what_only_other_outputs_read_is_dropped_where_goals_are_known() -> None:
    whole = model()
    named = values(whole)
    walk = Walk(whole, [{"x": X[0]}], [named["turned"], named["m"]])
    walk.advance(named["turned"])
    assert set(walk._envs[0]) == {"turned"}, "y, which reads h, is no goal"
    walk.advance(named["m"])
    assert set(walk._envs[0]) == set()


def test_goals_of_one_node_are_kept_until_asked_for() -> None:
    whole = model()
    named = values(whole)
    goals = [named["left"], named["right"], named["right"]]
    walk = Walk(whole, [{"x": X[0]}], goals)
    found = [walk.advance(goal)[0] for goal in goals]
    np.testing.assert_array_equal(found[1], found[2])
    assert walk._envs[0].keys() == set()


def test_control_flow_is_refused() -> None:
    text = """<ir_version: 11, opset_import: ["" : 24]>
    g (bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) { a = Identity (x) },
                    else_branch = e () => (float[2] b) { b = Neg (x) }>
    }"""
    with pytest.raises(ir.InputError, match="holds a subgraph"):
        Walk(ir.from_onnx_text(text), [{}])


def test_a_fork_goes_on_by_itself() -> None:
    whole = model()
    named = values(whole)
    walk = Walk(whole, [{"x": x} for x in X])
    (_, h) = walk.advance(named["h"])
    assert walk.fork(1) == 2
    walk.change(2, named["h"], 2 * h)
    found = walk.advance(named["y"])
    expected = Walk(model(), [{"x": X[0]}, {"x": X[1]}, {"x": 2 * X[1]}])
    again = expected.advance(values(expected._model)["y"])
    for mine, other in zip(found, again, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5)


def test_the_end_comes_for_one_set_after_the_other() -> None:
    whole = model()
    named = values(whole)
    walk = Walk(whole, [{"x": x} for x in X])
    walk.advance(named["h"])
    told: list[tuple[int, str]] = []

    def changed(index: int, value: ir.Value, array: np.ndarray) -> np.ndarray:
        told.append((index, str(value.name)))
        return array * 0 if value.name == "m" and index else array

    found = list(walk.finish([named["m"], named["y"]], changed))
    assert told == [(0, "m"), (0, "y"), (1, "m"), (1, "y")]
    plain = Walk(model(), [{"x": x} for x in X])
    mine = values(plain._model)
    h = plain.advance(mine["h"])
    np.testing.assert_array_equal(found[1], h[1])
    np.testing.assert_allclose(found[0], plain.advance(mine["y"])[0], rtol=1e-5)


def test_numbers_may_be_put_in_place_of_what_was_computed() -> None:
    whole = model()
    named = values(whole)
    walk = Walk(whole, [{"x": x} for x in X])
    turned = walk.advance(named["turned"])
    walk.put(named["turned"], [np.zeros_like(array) for array in turned])
    for (h, y), x in zip(
        zip(walk.advance(named["h"]), walk.advance(named["y"]), strict=True), X, strict=True
    ):
        assert len(h) == len(x)
        np.testing.assert_array_equal(y, h)
