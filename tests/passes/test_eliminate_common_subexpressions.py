"""eliminate-common-subexpressions: what is computed twice is computed once."""

import pytest

from omforge import ir
from omforge.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from omforge.testing import assert_leaves_alone, assert_rewrites

HEADER = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 4] x) => (float[N, 4] y)
<float two = {2.0}, float too = {2.0}, float three = {3.0}>
"""


def test_equal_nodes_with_equal_constants_merge() -> None:
    before = HEADER + "{ a = Mul (x, two) b = Mul (x, too) y = Add (a, b) }"
    after = HEADER + "{ a = Mul (x, two) y = Add (a, a) }"
    assert_rewrites(EliminateCommonSubexpressions(), before, after)


APART = {
    "other constants": "{ a = Mul (x, two) b = Mul (x, three) y = Add (a, b) }",
    "other operators": "{ a = Mul (x, two) b = Div (x, two) y = Add (a, b) }",
    "other attributes": """{ a = Softmax <axis = 0> (x) b = Softmax <axis = 1> (x)
        c = Mul (a, two) d = Mul (b, three) y = Add (c, d) }""",
}


@pytest.mark.parametrize("body", APART)
def test_different_nodes_stay(body: str, caplog: pytest.LogCaptureFixture) -> None:
    used = HEADER.replace("float too = {2.0}, ", "")
    if "three" not in APART[body]:
        used = used.replace(", float three = {3.0}", "")
    assert_leaves_alone(EliminateCommonSubexpressions(), used + APART[body], "", caplog)


def test_equal_constants_alone_count_as_a_change() -> None:
    """A pass that returns 0 has left the model untouched."""
    model = ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
    g (float[N] x) => (float[N] y) <float half = {0.5}, float other = {0.5}> {
        a = Mul (x, half) b = Neg (x) c = Add (b, other) y = Add (a, c)
    }""")
    assert EliminateCommonSubexpressions().run(model) == 1
    assert EliminateCommonSubexpressions().run(model) == 0
