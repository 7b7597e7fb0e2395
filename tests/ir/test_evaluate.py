"""Cut-outs: what they compute, where they stop, and what they refuse."""

import ml_dtypes
import numpy as np
import pytest

from omforge import ir
from omforge.ir import evaluate
from omforge.ir.evaluate import Cutout, EvaluationError, numbers, sizes
from omforge.ir.infer import infer_model
from omforge.ir.numerics import run
from tests.ir.symbolic import inferred, value


def cut(model: ir.Model, outputs: str = "y", inputs: str = "", opset: int = 24) -> Cutout:
    """A cut-out of a model by names."""
    given = {v.name: v for v in model.graph.inputs}
    return Cutout(
        [value(model, name) for name in outputs.split()],
        [given.get(name) or value(model, name) for name in inputs.split()],
        opset,
    )


MASK = inferred(
    "int64[n, s] ids, float[9, 4] table",
    """[look] e = Gather (table, ids)
       [shape] t = Shape <start = 1, end = 2> (e)
       k = Squeeze (t)
       [range] r = Range (zero, k, one)
       y = Unsqueeze (r, axes)""",
    "int64 zero = {0}, int64 one = {1}, int64[1] axes = {0}",
)


# -- what they compute


def test_shapes_are_leaves_whose_numbers_come_from_the_bindings():
    part = cut(MASK)
    assert [node.op_type for node in part.nodes] == ["Range", "Unsqueeze"]  # no embedding
    (array,) = part.run({}, {"s": 3})
    assert array.tolist() == [[0, 1, 2]]


def test_bfloat16_is_computed_wide_and_rounded():
    brain = ml_dtypes.bfloat16
    part = cut(inferred("bfloat16[2] x", "[a] t = Mul (x, x) [b] y = Add (t, x)"), inputs="x")
    x = np.array([1.0078125, 3], brain)
    (y,) = part.run({"x": x}, {})
    assert y.dtype == brain
    assert y.tolist() == (x * x + x).tolist()


def test_runs_again_with_other_bindings():
    part = cut(MASK)
    assert [part.run({}, {"s": size})[0].shape for size in (3, 5, 0)] == [(1, 3), (1, 5), (1, 0)]


def test_what_is_asked_for_is_computed_even_if_it_is_known():
    model = inferred("float[n, 4] x", "d = Shape (x) y = Concat <axis = 0> (d, d)")
    part = cut(model)
    assert [node.op_type for node in part.nodes] == ["Concat"]
    assert part.run({}, {"n": 7})[0].tolist() == [7, 4, 7, 4]


def test_computes_what_the_whole_model_would():
    body = "a = Sin (x) b = Mul (a, w) c = Softmax (b) y = Add (c, a)"
    model = inferred("float[n, 4] x", body, "float[4] w = {1, 2, 3, 4}")
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    model.graph.outputs[0].shape = ir.Shape(["n", 4])
    (array,) = cut(model, inputs="x").run({"x": x}, {})
    np.testing.assert_array_equal(array, run(model, {"x": x})["y"])


def test_cuts_at_an_inner_value_and_gives_several_outputs():
    model = inferred("float[n] x", "a = Exp (x) b = Neg (a) c = Abs (b)  y = Sqrt (c)")
    part = cut(model, outputs="c y b", inputs="b")
    assert [node.op_type for node in part.nodes] == ["Abs", "Sqrt"]
    found = part.run({"b": np.float32([-4])}, {})
    assert [array.tolist() for array in found] == [[4], [2], [-4]]


def test_nodes_come_in_an_order_that_runs():
    """`b` is reached through `d` first, and `c` needs it before."""
    body = "a = Neg (x) b = Abs (a) c = Add (a, b) d = Mul (c, b) y = Add (d, a)"
    model = inferred("float[n] x", body)
    part = cut(model, inputs="x")
    assert part.run({"x": np.float32([3])}, {})[0].tolist() == [-3]
    assert len(part.nodes) == 5


def test_a_value_beside_the_cut_may_be_made_by_the_same_node():
    model = inferred("float[n, 4] x", "a, b = Split <axis = 1, num_outputs = 2> (x) y = Sub (a, b)")
    part = cut(model, inputs="x a")
    x = np.float32([[1, 2, 3, 4]])
    (array,) = part.run({"x": x, "a": np.float32([[10, 10]])}, {})
    assert array.tolist() == [[7, 6]]


def test_inputs_that_are_not_needed_need_no_feed():
    model = inferred("float[n] x, float[n] z", "y = Neg (x)")
    (array,) = cut(model, inputs="x z").run({"x": np.float32([1])}, {})
    assert array.tolist() == [-1]


def test_constants_of_every_kind_come_along():
    body = "c = Constant <value_float = 2.0> () a = Mul (x, c) y = Add (a, w)"
    model = inferred("float[n] x", body, "float w = {1}")
    part = cut(model, inputs="x")
    assert [node.op_type for node in part.nodes] == ["Mul", "Add"]
    assert part.run({"x": np.float32([3])}, {})[0].tolist() == [7]


def test_a_constant_may_be_the_output():
    model = inferred("float[n] x", "y = Constant <value_ints = [1, 2]> ()")
    assert cut(model).run({}, {})[0].tolist() == [1, 2]


def test_constants_on_disk_come_along(tmp_path):
    model = inferred("float[n, 2] x", "y = MatMul (x, w)", "float[2, 2] w = {1, 2, 3, 4}")
    model.graph.outputs[0].shape = ir.Shape(["n", 2])
    ir.save(model, tmp_path / "m.onnx", external="m.weights", threshold=0)
    loaded = ir.load(tmp_path / "m.onnx")
    infer_model(loaded)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    (array,) = cut(loaded, inputs="x").run({"x": np.float32([[1, 1]])}, {})
    assert array.tolist() == [[4, 6]]


def test_runs_at_the_opset_that_the_nodes_are_written_in():
    model = inferred("float[n, 4] x", "y = ReduceSum <axes = [1]> (x)", opset=11)
    part = cut(model, inputs="x", opset=11)
    assert part.run({"x": np.ones((2, 4), np.float32)}, {})[0].tolist() == [[4], [4]]


def test_ops_of_other_domains_run_if_onnxruntime_has_them():
    text = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    g (float[n, 4] x) => (float[n, 4] y) { y = com.microsoft.QuickGelu <alpha = 1.0> (x) }"""
    model = ir.from_onnx_text(text)
    infer_model(model)
    (array,) = cut(model, inputs="x", opset=20).run({"x": np.zeros((1, 4), np.float32)}, {})
    assert array.tolist() == [[0, 0, 0, 0]]


# -- what they refuse


def test_refuses_what_depends_on_an_input_that_is_not_given():
    with pytest.raises(EvaluationError, match="depends on ids: which is not given"):
        cut(MASK, outputs="e")
    with pytest.raises(EvaluationError, match="depends on table: which is not given"):
        cut(MASK, outputs="e", inputs="ids")


def test_refuses_a_default_that_callers_may_override():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n] x, float k = {2}) => (float[n] y) { y = Mul (x, k) }""")
    infer_model(model)
    with pytest.raises(EvaluationError, match="depends on k"):
        cut(model, inputs="x", opset=20)


def test_refuses_a_large_weight(monkeypatch):
    model = inferred("float[n, 4] x", "y = Add (x, w)", "float[4] w = {1, 2, 3, 4}")
    cut(model, inputs="x")
    monkeypatch.setattr(evaluate, "MAX_CONSTANT_BYTES", 15)
    with pytest.raises(EvaluationError, match="w is a weight of 16 bytes"):
        cut(model, inputs="x")


def test_refuses_a_large_weight_on_disk_without_reading_it(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_CONSTANT_BYTES", 15)
    tensor = ir.ExternalTensor(
        "nowhere.bin", 0, 16, ir.DataType.FLOAT, shape=ir.Shape([4]), name="w", base_dir=tmp_path
    )
    model = inferred("float[n, 4] x", "y = Add (x, w)", "float[4] w = {1, 2, 3, 4}")
    model.graph.initializers["w"].const_value = tensor
    with pytest.raises(EvaluationError, match="w is a weight of 16 bytes"):
        cut(model, inputs="x")


def test_runs_branches_with_what_they_read_from_outside():
    model = inferred(
        "float[n] x, bool c",
        """h = Neg (x)
        [choice] y = If (c) <
            then_branch = t () => (float[] u) { u = Neg (h) },
            else_branch = e () => (float[] w) { w = Abs (h) }>""",
    )
    x = np.array([-1.0, 2.0], np.float32)
    for chosen, wanted in ((True, x), (False, np.abs(x))):
        (y,) = cut(model, inputs="x c").run({"x": x, "c": np.array(chosen)}, {})
        np.testing.assert_array_equal(y, wanted)
    with pytest.raises(EvaluationError, match="it depends on x"):
        cut(model, inputs="c")


def test_refuses_an_input_whose_dtype_inference_did_not_find():
    text = """<ir_version: 10, opset_import: ["" : 20, "com.example" : 1]>
    g (float[n] x) => (float[n] y) { h = com.example.Strange (x) y = Neg (h) }"""
    model = ir.from_onnx_text(text)
    infer_model(model)
    with pytest.raises(EvaluationError, match="h has no dtype"):
        cut(model, inputs="h", opset=20)


def test_a_missing_feed_is_named():
    model = inferred("float[n] x, float[n] z", "y = Add (x, z)")
    with pytest.raises(EvaluationError, match="depends on z: which is not fed"):
        cut(model, inputs="x z").run({"x": np.float32([1])}, {})


def test_a_missing_binding_is_named():
    with pytest.raises(EvaluationError, match=r"dimension s has no number.*bound ones \(n\)"):
        cut(MASK).run({}, {"n": 2})


def test_what_onnxruntime_says_is_passed_on():
    model = inferred("float[n] x", "y = Neg (x)")
    with pytest.raises(EvaluationError, match=r"ONNX Runtime refuses the cut-out.*data type"):
        cut(model, inputs="x").run({"x": np.int64([1])}, {})


# -- numbers and sizes


def test_symbolic_values_and_shapes_become_numbers():
    model = inferred("float[n, s, 8] x", "d = Shape (x) i = Cast <to = 6> (d) y = Neg (x)")
    assert numbers(value(model, "i"), {"n": 2, "s": 3}).tolist() == [2, 3, 8]
    assert numbers(value(model, "i"), {"n": 2, "s": 3}).dtype == np.int32
    assert sizes(value(model), {"n": 2, "s": 3}) == (2, 3, 8)


def test_what_is_not_known_has_no_numbers():
    model = inferred("float[] x", "y = Neg (x)")
    with pytest.raises(EvaluationError, match="the value of y is not known"):
        numbers(value(model), {})
    with pytest.raises(EvaluationError, match="y has no known rank"):
        sizes(value(model), {})
    with pytest.raises(EvaluationError, match="dimension n has no number"):
        sizes(value(inferred("float[n] x", "y = Neg (x)")), {})


def test_dtypes_that_numpy_lacks_are_cut_too():
    model = inferred("float[n] x", "y = Cast <to = 1> (w)", "float w = {1}")
    array = np.array([1.5, -2.0], dtype=ml_dtypes.bfloat16)
    model.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    assert cut(model).run({}, {})[0].tolist() == [1.5, -2.0]
