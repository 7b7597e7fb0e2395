"""Guests see the whole model, and give back only what they changed."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx.reference import ReferenceEvaluator

from omforge import ir

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 64] x) => (float[N, 64] y) <float one = {1}> {
    [first] h = MatMul (x, w)
    [noop] i = Identity (h)
    [second] z = MatMul (i, w2)
    [third] s = Mul (z, one)
    [last] y = Add (s, k)
}"""


def matrix(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((64, 64)).astype(np.float32)


@pytest.fixture(params=["inline", "external"])
def model(request, tmp_path) -> ir.Model:
    """Two weights and a Constant of 16 KiB each, metadata on the first node and on the model."""
    proto = onnx.parser.parse_model(TEXT)
    value = onnx.numpy_helper.from_array(matrix(2))
    constant = onnx.helper.make_node("Constant", [], ["k"], name="const", value=value)
    proto.graph.node.insert(0, constant)
    for seed, name in enumerate(("w", "w2")):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(matrix(seed), name))
    proto.graph.node[1].metadata_props.add(key="layer", value="model.layers.0")
    proto.graph.node[1].doc_string = "from the exporter"
    proto.metadata_props.add(key="made", value="here")
    made = ir.from_proto(proto)
    made.graph[1].outputs[0].metadata_props["note"] = "kept"
    if request.param == "inline":
        return made
    ir.save(made, tmp_path / "m.onnx", external="m.weights")
    return ir.load(tmp_path / "m.onnx")


def weight(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def run(model: ir.Model) -> np.ndarray:
    """The model's output for a fixed input, by onnx's reference evaluator."""
    copy = model.clone()
    ir.replace_tensors(copy, lambda t: ir.Tensor(t.numpy(), dtype=t.dtype, name=t.name))
    return ReferenceEvaluator(ir.to_proto(copy)).run(None, {"x": matrix(9)})[0]


def lines(model: ir.Model) -> list[str]:
    """The lines of its text, without the order of initializers, which graphsurgeon changes."""
    return sorted(line.rstrip(",") for line in ir.to_text(model).splitlines())


def surgeon_node(graph: gs.Graph, name: str) -> gs.Node:
    return next(node for node in graph.nodes if node.name == name)


# -- graphsurgeon


def test_an_untouched_model_comes_back_the_same(model):
    before, before_lines = run(model), lines(model)
    tensors = [tensor for _, tensor in ir.all_tensors(model)]
    assert ir.via_graphsurgeon(model, lambda graph: None) is model
    np.testing.assert_array_equal(run(model), before)
    assert lines(model) == before_lines
    after = {id(tensor) for _, tensor in ir.all_tensors(model)}
    assert {id(t) for t in tensors if t.nbytes > 1024} <= after  # shared, not copied
    assert ir.verify(model) == []


def test_metadata_that_graphsurgeon_drops_is_restored(model):
    ir.via_graphsurgeon(model, lambda graph: graph.cleanup().toposort())
    first = next(node for node in model.graph if node.name == "first")
    assert first.metadata_props["layer"] == "model.layers.0"
    assert first.doc_string == "from the exporter"
    assert first.outputs[0].metadata_props["note"] == "kept"
    assert model.metadata_props["made"] == "here"


def test_an_edit_in_place_and_a_returned_graph_both_count(model):
    def bypass(graph: gs.Graph) -> None:
        noop = surgeon_node(graph, "noop")
        surgeon_node(graph, "second").inputs[0] = noop.inputs[0]
        noop.outputs.clear()
        graph.cleanup()

    before = run(model)
    ir.via_graphsurgeon(model, bypass)
    assert "Identity" not in [node.op_type for node in model.graph]
    np.testing.assert_array_equal(run(model), before)

    def copied(graph: gs.Graph) -> gs.Graph:
        copy = graph.copy()
        surgeon_node(copy, "third").op = "Div"
        return copy

    ir.via_graphsurgeon(model, copied)
    assert "Div" in [node.op_type for node in model.graph]
    np.testing.assert_array_equal(run(model), before)


@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_an_edited_constant_comes_out_edited(model, how):
    """Graphsurgeon keeps data_location=EXTERNAL, and so exports the file's old weights."""

    def scale(graph: gs.Graph) -> None:
        constant = surgeon_node(graph, "first").inputs[1]
        if how == "in place":
            constant.values[...] *= 2
        else:
            constant.values = constant.values * 2
        exported.extend(gs.export_onnx(graph).graph.initializer)

    exported: list[onnx.TensorProto] = []
    kept = weight(model, "w2")
    ir.via_graphsurgeon(model, scale)
    np.testing.assert_array_equal(weight(model, "w").numpy(), 2 * matrix(0))
    assert weight(model, "w2") is kept
    # What the guest exports by itself is edited too, and whole.
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in exported}
    np.testing.assert_array_equal(arrays["w"], 2 * matrix(0))
    np.testing.assert_array_equal(arrays["w2"], matrix(1))


def test_an_edited_constant_node_comes_out_edited(model):
    def scale(graph: gs.Graph) -> None:
        surgeon_node(graph, "const").attrs["value"].values *= 3

    ir.via_graphsurgeon(model, scale)
    tensor = dict(ir.all_tensors(model))["const.value"]
    np.testing.assert_array_equal(tensor.numpy(), 3 * matrix(2))


def test_a_constant_that_was_only_read_is_still_shared(model):
    kept, seen = weight(model, "w"), []
    ir.via_graphsurgeon(
        model, lambda g: seen.append(surgeon_node(g, "first").inputs[1].values.sum())
    )
    assert seen == [matrix(0).sum()]
    assert weight(model, "w") is kept


def test_new_and_renamed_constants(model):
    def edit(graph: gs.Graph) -> None:
        surgeon_node(graph, "first").inputs[1].name = "renamed"
        surgeon_node(graph, "third").inputs[1] = gs.Constant("new", np.full((64, 64), 1.0, "f4"))

    kept, before = weight(model, "w"), run(model)
    ir.via_graphsurgeon(model, edit)
    assert weight(model, "renamed") is kept
    assert weight(model, "new").numpy().shape == (64, 64)
    np.testing.assert_array_equal(run(model), before)


def test_constants_can_be_folded_by_the_guest(model):
    """It runs ONNX Runtime on a part of its graph, which needs the real weights."""

    def transpose_and_fold(graph: gs.Graph) -> None:
        first = surgeon_node(graph, "first")
        out = gs.Variable("wt", np.float32, (64, 64))
        graph.nodes.insert(0, gs.Node("Transpose", "t", {"perm": [1, 0]}, [first.inputs[1]], [out]))
        first.inputs[1] = out
        graph.fold_constants().cleanup()

    ir.via_graphsurgeon(model, transpose_and_fold)
    assert "Transpose" not in [node.op_type for node in model.graph]
    np.testing.assert_array_equal(weight(model, "wt").numpy(), matrix(0).T)


@pytest.mark.parametrize("size", [4, 64])
def test_an_edited_int4_weight_survives(size):
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
g (float[2] x) => (float[M, M] y) { y = DequantizeLinear (q, s) }""")
    values = np.arange(size**2).reshape(size, size) % 16 - 8
    model = ir.from_proto(proto)
    for name, array in (("q", values.astype(ml_dtypes.int4)), ("s", np.array(1, np.float32))):
        value = model.graph[0].inputs["qs".index(name)]
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)

    def negate(graph: gs.Graph) -> None:
        constant = graph.nodes[0].inputs[0]
        constant.values = (-1 - constant.values.astype(int)).astype(ml_dtypes.int4)

    ir.via_graphsurgeon(model, negate)
    tensor = weight(model, "q")
    assert tensor.dtype is ir.DataType.INT4
    np.testing.assert_array_equal(tensor.numpy().astype(int), -1 - values)
    assert len(tensor.tobytes()) == size**2 // 2


def test_a_failing_function_is_named_and_the_model_left_alone(model):
    def clumsy(graph: gs.Graph) -> None:
        graph.nodes.clear()
        raise KeyError("no such node")

    text = ir.to_text(model)
    with pytest.raises(ir.OmforgeError, match=r"function clumsy failed: KeyError: 'no such node'"):
        ir.via_graphsurgeon(model, clumsy)
    assert ir.to_text(model) == text


def test_a_wrong_return_value_is_refused(model):
    with pytest.raises(ir.InputError, match="returned ModelProto"):
        ir.via_graphsurgeon(model, gs.export_onnx)


def test_what_cannot_be_exported_is_reported(model):
    def untyped(graph: gs.Graph) -> None:
        graph.outputs = [gs.Variable("y")]

    with pytest.raises(ir.OmforgeError, match="what untyped made cannot be exported"):
        ir.via_graphsurgeon(model, untyped)


# -- onnxsim


def test_onnxsim_simplifies_and_shares_the_weights(model):
    before, kept = run(model), [weight(model, "w"), weight(model, "w2")]
    assert ir.via_onnxsim(model) is model
    assert [node.op_type for node in model.graph] in (
        ["MatMul", "MatMul", "Add"],
        ["MatMul", "MatMul", "Mul", "Add"],
    )
    assert [weight(model, "w"), weight(model, "w2")] == kept
    assert [value.name for value in model.graph.inputs] == ["x"]
    np.testing.assert_allclose(run(model), before, rtol=1e-6)
    assert ir.verify(model) == []


def test_onnxsim_keeps_the_metadata(model):
    ir.via_onnxsim(model)
    first = model.graph[0]
    assert first.metadata_props["layer"] == "model.layers.0"
    assert first.outputs[0].metadata_props["note"] == "kept"
    assert model.metadata_props == {"made": "here"}  # and none of onnxsim's own


def test_onnxsim_must_not_merge_or_fold_large_weights():
    """Two stand-ins of one shape must stay two weights, and a transposed weight stays a node."""
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 64] x) => (float[N, 64] y) {
    t = Transpose <perm = [1, 0]> (w)
    h = MatMul (x, t)
    y = MatMul (h, w2)
}""")
    for seed, name in enumerate(("w", "w2")):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(matrix(seed), name))
    model = ir.from_proto(proto)
    ir.via_onnxsim(model)
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "MatMul"]
    assert set(model.graph.initializers) == {"w", "w2"}


def test_onnxsim_options_pass_through(model):
    ir.via_onnxsim(model, perform_optimization=False, skip_constant_folding=True)
    assert "Identity" in [node.op_type for node in model.graph]


def test_onnxsim_failure_is_reported_and_the_model_left_alone(model):
    text = ir.to_text(model)
    with pytest.raises(ir.OmforgeError, match=r"onnxsim failed: TypeError: .*no_such_option"):
        ir.via_onnxsim(model, no_such_option=1)
    assert ir.to_text(model) == text


def test_guests_are_not_imported_with_the_ir():
    code = "import sys, omforge.ir; print([m for m in sys.modules if m.split('.')[0] in %r])"
    guests = ("onnxsim", "onnx_graphsurgeon", "onnxruntime", "torch", "transformers")
    result = subprocess.run(
        [sys.executable, "-c", code % (guests,)], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
