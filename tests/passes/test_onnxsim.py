"""onnxsim: a guest among the passes."""

from omforge.passes.onnxsim import Onnxsim
from omforge.testing import assert_same_numbers, parse

MODEL = """<ir_version: 10, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y) <float one = {1.0}, float two = {2.0}> {
    three = Add (one, two) h = Identity (x) y = Mul (h, three) }"""


def test_folds_and_removes() -> None:
    before, model = parse(MODEL), parse(MODEL)
    assert Onnxsim().run(model) == 2
    assert [node.op_type for node in model.graph] == ["Mul"]
    assert_same_numbers(before, model)


def test_tells_of_a_change_even_if_no_node_is_gone() -> None:
    # What a guest did besides is not counted, so instruments must always look.
    model = parse("""<ir_version: 10, opset_import: ["" : 17]>
        g (float[N] x) => (float[N] y) { y = Neg (x) }""")
    assert Onnxsim().run(model) == 1
