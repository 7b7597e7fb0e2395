"""The builder: shapes are computed as nodes are recorded, and a refusal leaves no trace."""

from typing import Any

import numpy as np
import pytest

from omforge import ir
from omforge.ir.dims import parse_dim, symbol
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    broadcast,
    dims,
    moves_unit_axes_only,
    number,
    reshape_target,
)
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


def test_unknown_shapes_are_refused() -> None:
    for value in (ir.Value(name="v"), ir.Value(name="v", shape=ir.Shape([None, 2]))):
        with pytest.raises(NotLegal, match="'v' is not known"):
            dims(value)
    with pytest.raises(NotLegal, match="the batch is b, must be a number"):
        number(symbol("b"), "the batch")


@pytest.mark.parametrize(
    ("shape", "result", "target"),
    [
        (["2", "s", "12"], ["2", "s", "3", "4"], [2, 0, 3, 4]),
        (["2", "s", "12"], ["2", "3", "s", "4"], [2, 3, -1, 4]),
        (["2", "4*s", "6 + s"], ["8", "s", "6 + s"], [8, -1, 0]),
        (["2", "s", "6 + s"], ["6 + s", "2", "s"], None),
    ],
)
def test_a_reshape_of_symbols_copies_what_stays_and_leaves_one_out(
    shape: list[str], result: list[str], target: list[int] | None
) -> None:
    parsed = [
        [parse_dim(int(dim) if dim.isdigit() else dim) for dim in of] for of in (shape, result)
    ]
    assert reshape_target(*parsed) == target


def test_gears_are_numbers_for_symbols(model: ir.Model) -> None:
    op = Builder(model.graph, target("Ascend310P3"), {"seq": (1, 16)})
    assert op.at_gears((2, symbol("seq"), symbol("seq") + 8)) == [(2, 1, 9), (2, 16, 24)]
    with pytest.raises(NotLegal, match="'rows' may be anything"):
        op.at_gears((symbol("rows"),))


def test_a_split_into_parts_of_unknown_size_is_slices(model: ir.Model) -> None:
    x = model.graph.inputs[0]
    x.shape = ir.Shape([2, ir.SymbolicDim("8 + seq")])
    op = Builder(model.graph, target("Ascend310P3"))
    op.begin(model.graph[0])
    first, rest = op.split(x, (8, symbol("seq")))
    assert [node.op_type for node in op.pending] == ["Slice", "Slice"]
    assert (dims(first), dims(rest)) == ((2, 8), (2, symbol("seq")))
    with pytest.raises(NotLegal, match="only the last"):
        op.split(x, (symbol("seq"), 8))


def test_broadcasting_of_symbols_takes_equal_ones_only() -> None:
    s = symbol("s")
    assert broadcast((2, 1, s), (s,)) == (2, 1, s)
    assert broadcast((1, 4), (s, 1)) == (s, 4)
    with pytest.raises(NotLegal, match="do not broadcast"):
        broadcast((2, s), (2, 3))


def test_an_abandoned_name_is_free_again(model: ir.Model, op: Builder) -> None:
    first = op.mul(model.graph.inputs[0], 2.0).name
    op.abandon()
    op.begin(model.graph[0])
    assert op.mul(model.graph.inputs[0], 2.0).name == first


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


def test_a_stored_tensor_is_made_once_and_not_read(model: ir.Model, op: Builder) -> None:
    made: list[ir.TensorProtocol] = []

    def make() -> ir.TensorProtocol:
        def compute() -> ir.TensorProtocol:
            raise AssertionError("nothing is computed before it is written")

        lazy = ir.LazyTensor(compute, dtype=ir.DataType.INT8, shape=ir.Shape([2, 3]))
        made.append(lazy)
        return lazy

    first = op.stored("key", "weight", make)
    op.abandon()
    assert op.stored("key", "weight", make) is first
    assert op.stored("other", "weight", make) is not first
    assert len(made) == 2
    assert (first.dtype, first.shape) == (ir.DataType.INT8, [2, 3])
    assert model.graph.initializers["weight"] is first
