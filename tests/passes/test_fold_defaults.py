"""fold-defaults: an initializer that is an input too becomes a constant."""

import numpy as np

from omforge import ir
from omforge.ir import numerics
from omforge.passes.fold_defaults import FoldDefaults
from omforge.rewriting.events import events
from omforge.testing import parse

TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 2] x, float[2, 2] lora = {1, 2, 3, 4}, float[2] plain) => (float[N, 2] y) {
    z = MatMul (x, lora)
    y = Add (z, plain)
}"""


def test_the_default_is_what_the_graph_computes_with() -> None:
    before, after = parse(TEXT), parse(TEXT)
    assert FoldDefaults().run(after) == 1
    ir.check(after)
    assert [value.name for value in after.graph.inputs] == ["x", "plain"]
    assert list(after.graph.initializers) == ["lora"]
    feeds = {"x": np.ones((3, 2), np.float32), "plain": np.ones(2, np.float32)}
    np.testing.assert_array_equal(numerics.run(after, feeds)["y"], numerics.run(before, feeds)["y"])
    (event,) = events(after)
    assert "(lora)" in event.where


def test_a_model_without_defaults_is_left_alone() -> None:
    model = parse(TEXT.replace(" = {1, 2, 3, 4}", ""))
    assert FoldDefaults().run(model) == 0
    assert events(model) == ()
