"""What was quantised is kept with the model."""

from omforge import ir
from omforge.passes.quantization.report import QuantizedLayer, add_layers, quantized_layers


def test_layers_add_up() -> None:
    model = ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
    g (float x) => (float y) { y = Relu (x) }""")
    assert quantized_layers(model) == ()
    layers = [
        QuantizedLayer(name, (64, 8), 4, 32, True, "rtn", 1024, 288, False) for name in ("a", "b")
    ]
    add_layers(model, layers[:1])
    add_layers(model, layers[1:])
    assert quantized_layers(model) == tuple(layers)
