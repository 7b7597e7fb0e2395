"""The builder: shapes are computed as nodes are recorded, and a refusal leaves no trace."""

from typing import Any

import numpy as np
import pytest

from omforge import ir
from omforge.lowering.legalize.builder import Builder, NotLegal, dims, moves_unit_axes_only
from omforge.lowering.target import target


@pytest.fixture
def model(text_to_model: Any) -> ir.Model:
    return text_to_model("g (float[2,3,4] x) => (float[2,3,4] y) { y = Relu (x) }")


@pytest.fixture
def op(model: ir.Model) -> Builder:
    builder = Builder(model.graph, target("Ascend310P3"))
    builder.begin(model.graph[0])
    return builder


def test_equal_constants_are_one_initializer(model: ir.Model, op: Builder) -> None:
    half = op.constant(0.5, ir.DataType.FLOAT)
    assert op.constant(0.5, ir.DataType.FLOAT) is half
    assert op.constant([0.5], ir.DataType.FLOAT) is not half
    assert op.constant(0.5, ir.DataType.FLOAT16) is not half
    assert half.shape == ir.Shape([])
    assert len(model.graph.initializers) == 3


def test_a_chain_of_reshapes_is_one_and_a_round_trip_is_none(model: ir.Model, op: Builder) -> None:
    x = model.graph.inputs[0]
    flat = op.reshape(x, (24,))
    assert op.reshape(flat, (2, 3, 4)) is x
    wide = op.reshape(flat, (4, 6)).producer()
    assert wide is not None
    assert wide.inputs[0] is x


def test_a_transpose_of_unit_axes_is_a_reshape(model: ir.Model, op: Builder) -> None:
    four = op.reshape(model.graph.inputs[0], (1, 2, 1, 12))
    assert dims(op.transpose(four, (2, 0, 1, 3))) == (1, 1, 2, 12)
    producer = op.transpose(four, (0, 3, 2, 1)).producer()
    assert producer is not None
    assert producer.op_type == "Transpose"
    assert moves_unit_axes_only((1, 5, 1), (2, 1, 0))
    assert not moves_unit_axes_only((2, 5, 1), (1, 0, 2))


@pytest.mark.parametrize(
    "record",
    [
        lambda op, x: op.reshape(x, (5, 5)),
        lambda op, x: op.matmul(x, x),
        lambda op, x: op.add(x, op.reshape(x, (4, 3, 2))),
    ],
)
def test_shapes_that_do_not_fit_are_refused(model: ir.Model, op: Builder, record: Any) -> None:
    with pytest.raises(NotLegal):
        record(op, model.graph.inputs[0])


def test_unknown_and_symbolic_shapes_are_refused() -> None:
    with pytest.raises(NotLegal, match="'v' is not known"):
        dims(ir.Value(name="v"))
    with pytest.raises(NotLegal, match="not static"):
        dims(ir.Value(name="v", shape=ir.Shape(["batch", 2])))


def test_an_abandoned_recording_leaves_the_graph_as_it_was(model: ir.Model, op: Builder) -> None:
    x = model.graph.inputs[0]
    made = op.shared("key", lambda: op.mul(x, 2.0))
    op.abandon()
    assert set(x.consumers()) == {model.graph[0]}
    assert len(model.graph) == 1
    op.begin(model.graph[0])
    assert op.shared("key", lambda: op.mul(x, 2.0)) is not made


def test_a_committed_result_takes_the_place_and_name_of_the_output(
    model: ir.Model, op: Builder
) -> None:
    node = model.graph[0]
    node.name = "relu"
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'model']"
    op.begin(node)
    op.commit(op.mul(model.graph.inputs[0], 2.0))
    (made,) = list(model.graph)
    assert made.op_type == "Mul"
    assert model.graph.outputs[0] is made.outputs[0]
    assert model.graph.outputs[0].name == "y"
    assert made.name == "relu/Mul"
    assert made.metadata_props == {
        "pkg.torch.onnx.name_scopes": "['', 'model']",
        "legalized_from": "Relu relu",
    }


def test_an_output_that_is_an_input_gets_an_identity(model: ir.Model, op: Builder) -> None:
    op.commit(model.graph.inputs[0])
    assert [node.op_type for node in model.graph] == ["Identity"]
    assert model.graph.outputs[0].name == "y"


def test_a_constant_keeps_its_numbers(op: Builder) -> None:
    tensor = op.constant(np.arange(6).reshape(2, 3), ir.DataType.INT64).const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), np.arange(6).reshape(2, 3))
