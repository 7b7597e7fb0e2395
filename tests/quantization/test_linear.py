"""Which weights are linear layers, and who else reads them."""

import pytest

from omforge import ir
from omforge.quantization.linear import check_linears, find_linears, stored_as_integers
from omforge.rewriting.events import events
from tests.quantization.weights import weighted

MODEL = """<ir_version: 11, opset_import: ["" : 24]>
g (int64[B, S] ids, float[B, S, 8] x, float[8, 4] given,
   float[6, 8] embedding, float[8, 4] up, float[4, 8] down, float[8] bias, float[8, 8] shared)
   => (float y)
{
    %s
}"""


def linears(body: str) -> dict[str, tuple[int, str]]:
    model = weighted(ir.from_onnx_text(MODEL % body), 3)
    return {linear.name: (linear.axis, linear.obstacle()) for linear in find_linears(model)}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = MatMul (x, up)", {"up": (0, "")}),
        ("y = Gemm (x, up)", {"up": (0, "")}),
        ("y = Gemm <transB = 1> (x, down)", {"down": (1, "")}),
        ("t = Transpose <perm = [1, 0]> (down) y = MatMul (x, t)", {"down": (1, "")}),
        # Not a swap of the last two axes.
        ("t = Transpose <perm = [0, 1]> (down) y = MatMul (x, t)", {}),
        ("a = MatMul (x, shared) y = MatMul (a, shared)", {"shared": (0, "")}),
        # No weights: an input, a bias, an activation.
        ("y = MatMul (x, given)", {}),
        ("y = Add (x, bias)", {}),
        ("y = MatMul (x, x)", {}),
        # A tied embedding.
        (
            "e = Gather (embedding, ids) t = Transpose <perm = [1, 0]> (embedding) y = MatMul (e, t)",
            {"embedding": (1, "")},
        ),
        ("e = Gather (embedding, ids) y = Relu (e)", {}),
    ],
)
def test_linear_layers(body: str, found: dict[str, tuple[int, str]]) -> None:
    assert linears(body) == found


@pytest.mark.parametrize(
    ("body", "name", "why"),
    [
        ("a = MatMul (x, up) r = Relu (up) y = MatMul (a, r)", "up", "Relu"),
        (
            "t = Transpose <perm = [1, 0]> (shared) a = MatMul (x, t) y = MatMul (a, shared)",
            "shared",
            "both of its axes",
        ),
        ("e = Gather (shared, ids) y = MatMul (e, shared)", "shared", "embedding lookup"),
    ],
)
def test_what_stands_in_the_way(body: str, name: str, why: str) -> None:
    assert why in linears(body)[name][1]


def test_a_model_without_float_weights_is_refused_and_says_what_it_has() -> None:
    integers = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[N, 2] x) => (float[N, 2] y) <int8[2, 2] q = {1, 2, 3, 4}, float s = {2.0}> {
        w = DequantizeLinear (q, s) t = Transpose <perm = [1, 0]> (w) a = MatMul (x, t)
        y = MatMul (a, w) }"""
    model = ir.from_onnx_text(integers)
    assert [value.name for value in stored_as_integers(model)] == ["q"]
    with pytest.raises(ir.InputError, match="1 weights of products are integers already"):
        check_linears(model, find_linears(model), "quantize-weights")
    assert any("stored as INT8 already" in event.reason for event in events(model))
    model = ir.from_onnx_text(
        MODEL % "k = Cast <to = 3> (up) w = DequantizeLinear (k, scale) y = MatMul (x, w)"
    )
    assert stored_as_integers(model) == []  # what is computed is no weight
    model = ir.from_onnx_text(MODEL % "y = MatMul (x, x)")
    with pytest.raises(ir.InputError, match="no MatMul or Gemm multiplies by a constant matrix"):
        check_linears(model, find_linears(model), "quantize-weights")
