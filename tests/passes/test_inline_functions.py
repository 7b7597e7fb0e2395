"""inline-functions: calls of model-local functions become their bodies."""

from omforge import ir
from omforge.ir.numerics import run
from omforge.ir.verify import check
from omforge.passes.inline_functions import InlineFunctions
from omforge.testing import example_feeds, parse

NESTED = """<ir_version: 11, opset_import: ["" : 24, "local" : 1]>
g (float[N, 4] x) => (float[N, 4] y) { a = local.Twice (x) y = local.Gated (a) }
<domain: "local", opset_import: ["" : 24]>
Twice (x) => (y) { y = Add (x, x) }
<domain: "local", opset_import: ["" : 24, "local" : 1]>
Gated (x) => (y) { t = local.Twice (x) s = Sigmoid (t) y = Mul (x, s) }
"""


def test_nested_calls_are_inlined_and_keep_the_numbers() -> None:
    before, model = ir.from_onnx_text(NESTED), ir.from_onnx_text(NESTED)
    assert InlineFunctions().run(model) == 2
    assert [node.op_type for node in model.graph] == ["Add", "Add", "Sigmoid", "Mul"]
    assert not model.functions
    check(model)
    feeds = example_feeds(before)
    assert (run(model, feeds)["y"] == run(before, feeds)["y"]).all()


def test_a_model_without_functions_is_untouched() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (float[N] x) => (float[N] y) { y = Neg (x) }""")
    assert InlineFunctions().run(model) == 0
