"""The parts of the ATC dialect that are not operators: opset, constants, inputs, names."""

from typing import Any

import numpy as np
import onnx
import pytest

from omforge import ir
from omforge.ir.dims import evaluate, parse_dim
from omforge.ir.values import to_shape
from omforge.lowering.legalize import legalize
from omforge.lowering.target import target
from omforge.testing import parse
from tests.lowering.legalize.conftest import check_onnx, run

T = target("Ascend310P3")


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def test_constant_nodes_become_initializers(lower: Any) -> None:
    text = """
        g (float[2] x) => (float[2] y)
        {
            two = Constant <value_float = 2.0> ()
            rows = Constant <value_ints = [1, 0]> ()
            z = Gather (x, rows)
            y = Mul (z, two)
        }
    """
    lowered = lower(text, {"x": np.array([1, 2], np.float32)})
    assert lowered.ops == ["Gather", "Mul"]
    assert {value.dtype for value in lowered.model.graph.initializers.values()} == {
        ir.DataType.FLOAT,
        ir.DataType.INT64,
    }


def test_int64_inputs_become_int32(lower: Any) -> None:
    text = """
        g (int64[2] rows, float[3,4] table) => (float[2,4] y, int64[2] next)
        <int64 one = {1}>
        {
            y = Gather (table, rows)
            next = Add (rows, one)
        }
    """
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    lowered = lower(text, {"rows": np.array([2, 0]), "table": table})
    (rows, _) = lowered.model.graph.inputs
    assert rows.dtype == ir.DataType.INT32
    # An index reads int32 as it is; what computes with the numbers gets them as int64.
    assert lowered.ops == ["Cast", "Gather", "Add"]


def test_split_gets_its_sizes(lower: Any) -> None:
    text = """
        g (float[5,2] x) => (float[2,2] a, float[2,2] b, float[1,2] c)
        { a, b, c = Split <axis = 0, num_outputs = 3> (x) }
    """
    lowered = lower(text, {"x": np.zeros((5, 2), np.float32)})
    (node,) = nodes(lowered.model, "Split")
    assert "num_outputs" not in node.attributes
    sizes = node.inputs[1]
    assert sizes is not None
    assert sizes.const_value is not None
    assert sizes.const_value.numpy().tolist() == [2, 2, 1]


@pytest.mark.parametrize(("axis", "shape"), [(0, "3*seq, 2"), (1, "2, 3*seq"), (-1, "2, 3*seq")])
def test_an_open_axis_is_split_by_the_number_of_parts(axis: int, shape: str) -> None:
    part = shape.replace("3*", "")
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float[{shape.replace("3*seq", "rows")}] x) => (float[{part}] a, float[{part}] b,
           float[{part}] c)
        {{ p, b, c = Split <axis = {axis}, num_outputs = 3> (x)
           a = Neg (p) }}"""
    model = parse(text)
    model.graph.inputs[0].shape = to_shape([parse_dim(dim) for dim in shape.split(", ")])
    expected = model.clone()
    legalize(model, target("Ascend310P3"), gears={"seq": (1, 4)})
    (node,) = nodes(model, "Split")
    sizes = node.inputs[1]
    assert sizes is not None
    assert sizes.const_value is not None
    assert sizes.const_value.numpy().tolist() == [1, 1, 1]
    assert "num_outputs" not in node.attributes
    check_onnx(model)
    for seq in (1, 4):
        x = (
            np.random.default_rng(0)
            .normal(size=[evaluate(parse_dim(dim), {"seq": seq}) for dim in shape.split(", ")])
            .astype(np.float32)
        )
        for want, have in zip(run(expected, {"x": x}), run(model, {"x": x}), strict=True):
            np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("length", ["3*seq + 1", "seq"])
def test_an_open_axis_whose_parts_differ_stays(length: str) -> None:
    """The last part is smaller, by a length; what `check` then says of it is true."""
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
        g (float[rows, 2] x) => (float[u, 2] a, float[v, 2] b, float[w, 2] c)
        { a, b, c = Split <axis = 0, num_outputs = 3> (x) }""")
    model.graph.inputs[0].shape = to_shape([parse_dim(length), 2])
    legalize(model, target("Ascend310P3"), gears={"seq": (2, 5)})
    (node,) = nodes(model, "Split")
    assert "num_outputs" in node.attributes


def test_reductions_take_axes_as_an_attribute(lower: Any) -> None:
    text = """
        g (float[2,3] x) => (float[2,1] y)
        <int64[1] axes = {-1}>
        { y = ReduceMean <keepdims = 1, noop_with_empty_axes = 0> (x, axes) }
    """
    lowered = lower(text, {"x": np.ones((2, 3), np.float32)})
    (node,) = list(lowered.model.graph)
    assert node.attributes["axes"].as_ints() == (-1,)
    assert len(node.inputs) == 1
    assert not lowered.model.graph.initializers


def test_reduce_sum_keeps_its_axes_input(lower: Any) -> None:
    text = """
        g (float[2,3] x) => (float[2,1] y)
        <int64[1] axes = {-1}>
        { y = ReduceSum (x, axes) }
    """
    lowered = lower(text, {"x": np.ones((2, 3), np.float32)})
    assert len(next(iter(lowered.model.graph)).inputs) == 2


def test_cast_drops_what_only_float8_reads(lower: Any) -> None:
    text = "g (float[2] x) => (float16[2] y) { y = Cast <to = 10, saturate = 1> (x) }"
    lowered = lower(text, {"x": np.ones(2, np.float32)})
    assert set(next(iter(lowered.model.graph)).attributes) == {"to"}


def test_a_transpose_of_unit_axes_is_a_reshape(lower: Any) -> None:
    text = """
        g (float[2,1,3] x) => (float[1,2,3] moved, float[3,1,2] turned)
        { moved = Transpose <perm = [1, 0, 2]> (x)  turned = Transpose <perm = [2, 1, 0]> (x) }
    """
    x = np.arange(6, dtype=np.float32).reshape(2, 1, 3)
    assert lower(text, {"x": x}).ops == ["Reshape", "Transpose"]


def test_equal_reshapes_of_one_value_are_one_node(lower: Any) -> None:
    text = """
        g (float[6] x) => (float[3,2] y, float[3,2] z)
        <int64[2] wide = {2, 3}, int64[2] tall = {3, 2}>
        {
            a = Reshape (x, wide)
            b = Reshape (a, tall)
            c = Reshape (x, tall)
            y = Relu (b)
            z = Neg (c)
        }
    """
    lowered = lower(text, {"x": np.arange(6, dtype=np.float32)})
    assert lowered.ops.count("Reshape") == 2  # b stays on a: only c is the same move again


def test_dead_nodes_and_initializers_go_and_unused_outputs_keep_names(lower: Any) -> None:
    text = """
        g (float[4] x) => (float[1] y)
        <float[4] unused = {1.0, 2.0, 3.0, 4.0}, int64[1] k = {1}>
        { dead = Mul (x, unused)  y, where = TopK (x, k) }
    """
    lowered = lower(text, {"x": np.array([3, 1, 4, 1], np.float32)})
    assert lowered.ops == ["TopK"]
    assert set(lowered.model.graph.initializers) == {"k"}
    (node,) = list(lowered.model.graph)
    assert [value.name for value in node.outputs] == ["y", "where"]


def test_trailing_absent_inputs_are_dropped(text_to_model: Any) -> None:
    model = text_to_model("g (float[2] x, float hi) => (float[2] y) { y = Clip (x, , ) }")
    legalize(model, T)
    assert len(next(iter(model.graph)).inputs) == 1


def named(name: str, op: str, source: str, result: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(op, [source], [result], name=name, **attributes)


def model_of(*protos: onnx.NodeProto, output: str) -> ir.Model:
    def info(name: str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3])

    graph = onnx.helper.make_graph(list(protos), "g", [info("x")], [info(output)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["/layers.0/Relu", "b"], ["/layers.0/Relu", "b"]),
        (["", ""], ["h/Relu", "y/Neg"]),
        (["same", "same"], ["same", "same.1"]),
        (["x", "b"], ["x.node", "b"]),  # a graph input's name: E13009
        (["h", "y"], ["h.node", "y.node"]),  # tensors' names
        (["a b;c:d", "b"], ["a_b_c_d", "b"]),
    ],
)
def test_node_names(given: list[str], expected: list[str]) -> None:
    model = model_of(
        named(given[0], "Relu", "x", "h"), named(given[1], "Neg", "h", "y"), output="y"
    )
    legalize(model, T)
    assert [node.name for node in model.graph] == expected


def test_tensor_names_are_made_legal_and_outputs_keep_theirs() -> None:
    model = model_of(
        named("a", "Relu", "x", "h::1 +"), named("b", "Neg", "h::1 +", "y"), output="y"
    )
    legalize(model, T)
    assert [node.outputs[0].name for node in model.graph] == ["h__1__", "y"]


def test_no_name_begins_with_an_expanded_node_s_name_and_an_underscore() -> None:
    """ATC names the nodes inside an expanded Transpose `<node>_<suffix>`."""
    model = model_of(
        named("move", "Transpose", "x", "h", perm=[1, 0]),
        named("move_perm", "Transpose", "h", "y", perm=[1, 0]),
        output="y",
    )
    legalize(model, T)
    assert [node.name for node in model.graph] == ["move.outer", "move_perm"]


def test_an_unused_domain_is_not_imported() -> None:
    model = model_of(named("a", "Relu", "x", "y"), output="y")
    model.graph.opset_imports["com.microsoft"] = 1
    legalize(model, T)
    assert dict(model.graph.opset_imports) == {"": 16}
