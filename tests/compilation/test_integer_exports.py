"""A model that ONNX Runtime quantised is told what it is, ahead of every pass."""

from pathlib import Path

import pytest

from omforge import ir
from omforge.compilation.integer_exports import require_float_products

HEAD = '<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>'


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (
            """q, scale, z = DynamicQuantizeLinear (x)
            [product] p = MatMulInteger (q, w, z)
            y = Cast <to = 1> (p)""",
            "m.onnx is quantised dynamically: what its layers read is made int8 at every step "
            "(2 nodes: DynamicQuantizeLinear, MatMulInteger; the first is ",
        ),
        (
            "[product] y = com.microsoft.DynamicQuantizeMatMul (x, w, s)",
            "(1 nodes: DynamicQuantizeMatMul; the first is com.microsoft.DynamicQuantizeMatMul "
            "product), which ATC has no kernels for",
        ),
        (
            "[product] y = QLinearMatMul (x, s, w, w, s, w, s, w)",
            "m.onnx is quantised statically: its layers read int8 (1 nodes: QLinearMatMul;",
        ),
    ],
)
def test_integer_products_are_refused_by_name(nodes: str, said: str) -> None:
    model = ir.from_onnx_text(
        f"{HEAD} g (float[2, 2] x, uint8[2, 2] w, float s) => (float[2, 2] y) {{ {nodes} }}"
    )
    with pytest.raises(ir.InputError) as caught:
        require_float_products(model, Path("m.onnx"))
    assert said in f"{caught.value.what}: {caught.value.why}"
    assert caught.value.next_step.startswith("Compile the float export with --quantize int8")


def test_other_models_pass() -> None:
    text = f"{HEAD} g (float[2] x) => (float[2] y) {{ y = Neg (x) }}"
    require_float_products(ir.from_onnx_text(text), Path("m.onnx"))
