"""Text of a model: stable, short, and readable back where nothing was left out."""

import hashlib

import numpy as np
import onnx
import pytest

from omforge import ir

SMALL = """<
   ir_version: 10,
   opset_import: ["" : 20, "npu" : 1]
>
g (float[N,"past + seq"] x, bool c) => (float[N,"past + seq"] y)
   <
      float eps = {1e-06},
      float[3] "model.scale" = {0.0883883461, nan, -inf},
      double d = {0.1},
      float16[2] half = {15872, 16640},
      int64[2] axes = {-9223372036854775808, 1},
      bool[2] flags = {1, 0},
      string[1] words = {"a \\"b\\""},
      float[0,3] empty = {}
   >
{
   ["/model/layers.0/Mul"] "/model/t:0" = Mul (x, eps)
   z = If (c) <then_branch: graph = a () => (float t) {
      t = Constant <value_float: float = 0.1> ()
   }, else_branch: graph = b () => (float e) {
      e = Identity (eps)
   }>
   y = npu.NPUOp <alpha: float = 0.1, perm: ints = [1, 0], mode: string = "a"> ("/model/t:0", z)
}
"""


def test_reads_back_as_the_same_model():
    model = ir.from_onnx_text(SMALL)
    text = ir.to_text(model)
    assert ir.to_text(ir.from_onnx_text(text)) == text
    first, second = (onnx.parser.parse_model(t).graph for t in (SMALL, text))
    assert first == second


def test_one_initializer_per_line_with_the_shortest_number():
    lines = ir.to_text(ir.from_onnx_text(SMALL)).splitlines()
    assert "      float eps = {1e-06}," in lines
    assert '      float[3] "model.scale" = {0.088388346, nan, -inf},' in lines


def big(seed: int = 0, doc: str = "") -> ir.Model:
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
g (float[N,8] x) => (float[N,8] y) <float[8] b = {1,2,3,4,5,6,7,8}> {
   [n] h = MatMul (x, w)
   k = Constant <value = float[20] {1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7,8,9,0}> ()
   y = Foo (h, b, k)
}""")
    weights = np.full((8, 8), seed, np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    model = ir.from_proto(proto)
    model.graph[0].doc_string = doc
    model.graph[0].metadata_props["stack"] = doc
    model.producer_name = doc
    return model


def test_large_tensors_are_written_as_type_shape_and_hash():
    text = ir.to_text(big())
    assert f"      float[8,8] w = sha256:{hashlib.sha256(bytes(256)).hexdigest()[:12]}\n" in text
    assert 'value: tensor = string[1]{"float[20] sha256:' in text


def test_the_text_follows_the_weights_and_not_the_metadata():
    assert ir.to_text(big(doc="traceback")) == ir.to_text(big())
    assert ir.to_text(big(seed=1)) != ir.to_text(big())


def test_mapped_weights_give_the_same_text(tmp_path):
    ir.save(big(), tmp_path / "m.onnx", external="m.weights", threshold=64)
    assert ir.to_text(ir.load(tmp_path / "m.onnx")) == ir.to_text(big())


def test_the_model_is_left_as_it_was():
    model = big()
    tensor = model.graph.initializers["w"].const_value
    ir.to_text(model)
    assert model.graph.initializers["w"].const_value is tensor
    assert model.graph[0].metadata_props == {"stack": ""}


def test_types_of_inner_values_on_request():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
g (float[N,8] x) => (float[N,8] y) <float[N,"2*seq"] h> { h = Abs (x) y = Neg (h) }""")
    assert 'float[N,"2*seq"] h' not in ir.to_text(model)
    text = ir.to_text(model, types=True)
    assert '      float[N,"2*seq"] h\n' in text
    assert ir.to_text(ir.from_onnx_text(text), types=True) == text


@pytest.mark.parametrize("route", ["optimum", "dynamo", "hfexporter", "torchscript-op17"])
def test_real_exports_have_stable_text(exported, route):
    path = exported(route, "qwen2")
    assert ir.to_text(ir.load(path)) == ir.to_text(ir.load(path))
