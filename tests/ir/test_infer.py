"""Inference as a whole: real exports, what is read and what is not, and values that stay true."""

import logging

import numpy as np
import pytest

from omforge import ir
from omforge.ir.dims import parse_dim, symbol
from omforge.ir.infer import infer_model, infer_nodes
from omforge.ir.values import (
    MAX_TRACKED,
    attribute,
    constant,
    constant_tensor,
    dims,
    known,
    known_ints,
    set_type,
    to_shape,
)
from tests.exports import FAMILIES, ROUTES
from tests.ir.symbolic import assert_onnxruntime_agrees, elements, inferred, shape, value

# -- real exports


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_of_an_export_is_known(exported, route, family):
    model = ir.load(exported(route, family))
    infer_model(model)
    for node in model.graph:
        for output in node.outputs:
            found = dims(output)
            assert output.dtype is not None, output.name
            assert found is not None, output.name
            assert not any("unknown" in str(dim) for dim in found), f"{output.name}: {found}"


# 2 rows, 3 tokens in the cache and 2 new ones; exporters have several names for one size.
SIZES = {
    "optimum": {"batch_size": 2, "past_sequence_length": 3, "sequence_length": 2},
    "dynamo": {"batch": 2, "past_sequence": 3, "sequence": 2, "s53": 5},
    "hfexporter": {"s44": 2, "s43": 2, "s36": 3, "s70": 2, "s53": 5},
    "torchscript-op17": {
        "batch_size": 2,
        "past_sequence_length": 3,
        "sequence_length": 2,
        "total_sequence_length": 5,
    },
}


@pytest.mark.parametrize("route", ROUTES)
def test_onnxruntime_agrees_on_every_value_of_an_export(exported, route):
    model = ir.load(exported(route, "llama_gqa"))
    infer_model(model)
    assert assert_onnxruntime_agrees(model, SIZES[route], limit=2) > 100


def test_the_cache_grows_by_the_new_tokens(exported):
    model = ir.load(exported("optimum", "llama_gqa"))
    infer_model(model)
    present = dims(model.graph.outputs[1])
    total = parse_dim("past_sequence_length + sequence_length")
    assert present == (symbol("batch_size"), 2, total, 16)


def test_inferring_twice_is_inferring_once(exported):
    model = ir.load(exported("dynamo", "qwen2"))
    infer_model(model)
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    infer_model(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once


# -- what is read


def test_what_the_exporter_says_of_inner_values_is_not_read():
    model = inferred("float[n, 4] x", "h = Neg (x) y = Transpose (h)")
    value(model, "h").shape = ir.Shape([7, 7, 7])
    value(model, "y").shape = ir.Shape([9])
    infer_model(model)
    assert (shape(model, "h"), shape(model, "y")) == ("n, 4", "4, n")


def test_dimensions_are_read_as_numbers_names_and_expressions():
    given = ir.val("x", ir.DataType.FLOAT, ["16", "batch-size", "past + seq", None, 3, ""])
    found = dims(given)
    assert found[0] == 16
    assert [str(dim) for dim in found] == [
        "16", "batch-size", "past + seq", "unknown_x_3", "3", "unknown_x_5",
    ]  # fmt: skip
    assert dims(ir.val("x", ir.DataType.FLOAT)) is None


@pytest.mark.parametrize(
    "name", ["/model/layers.0/Add_output_0", "batch.1", "2", "a b", "a - b", "a`b", "batch-size"]
)
def test_a_value_may_have_any_name_and_its_unknown_dimensions_one_symbol_each(name):
    """Shapes are kept as text, so a name that looks like a division must not become one."""
    given = ir.val(name, ir.DataType.FLOAT, [None, 4])
    (unknown, four) = dims(given)
    set_type(given, None, (unknown, unknown * 2 + four))
    assert dims(given) == (unknown, unknown * 2 + 4)
    assert given.dtype == ir.DataType.FLOAT


def test_shapes_are_written_as_text():
    written = to_shape([symbol("past") + symbol("seq"), 4])
    assert written == ["past + seq", 4]
    given = ir.val("x", ir.DataType.FLOAT, [1])
    set_type(given, ir.DataType.INT64, None)
    assert (given.dtype, given.shape) == (ir.DataType.INT64, None)


def test_attributes_have_defaults():
    (node,) = inferred("float[n, 4] x", "y = Softmax <axis = 1> (x)").graph
    assert attribute(node, "axis", -1) == 1
    assert attribute(node, "none", -1) == -1


# -- constants and known values


TWO_FORMS = "float[n, 4] x", "c = Constant <value = int64[2] {3, 4}> () y = Add (c, w)"


def test_constants_are_initializers_and_constant_nodes():
    model = inferred(*TWO_FORMS, "int64[2] w = {1, 1}")
    w = model.graph.initializers["w"]
    for found, numbers in ((value(model, "c"), [3, 4]), (w, [1, 1])):
        assert constant(found).tolist() == numbers
        assert constant_tensor(found).shape == [2]
        assert known_ints(found) == numbers
        assert constant(found, limit=1) is None
    for computed in (None, value(model, "y"), model.graph.inputs[0]):
        assert constant(computed) is None
    assert known(model.graph.inputs[0]) is None
    assert known_ints(value(model, "y")) == [4, 5]


def test_a_default_that_callers_may_override_is_no_constant():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 4] x, int64[2] k = {2, 2}) => (float[] y) { y = Reshape (x, k) }""")
    infer_model(model)
    assert constant_tensor(model.graph.inputs[1]) is None
    assert shape(model) == "unknown_y_0, unknown_y_1"


def test_a_known_value_follows_its_initializer():
    """A pass may give an initializer another tensor after its value has been asked for."""
    model = inferred("float[n, 4] x", "y = Reshape (x, d)", "int64[2] d = {-1, 2}")
    d = model.graph.initializers["d"]
    assert known_ints(d) == [-1, 2]
    d.const_value = ir.tensor(np.array([-1, 1]), name="d")
    assert known_ints(d) == [-1, 1]
    infer_model(model)
    assert shape(model) == "4*n, 1"


def test_a_known_value_follows_its_inputs():
    model = inferred("float[n, 4] x", "y = Shape (x)")
    assert elements(model) == "n, 4"
    model.graph.inputs[0].shape = ir.Shape([7, 5])
    infer_model(model)
    assert known_ints(value(model)) == [7, 5]
    model.graph.inputs[0].shape = None
    infer_model(model)
    assert known(value(model)) is None


def test_numbers_are_not_asked_of_symbols():
    assert known_ints(value(inferred("float[n, 4] x", "y = Shape (x)"))) is None


def test_only_small_integers_are_tracked():
    fill = "ConstantOfShape <value = int64[1] {7}>"
    model = inferred(
        "float[n, 4] x",
        f"y = {fill} (s) z = {fill} (t)",
        f"int64[1] s = {{{MAX_TRACKED}}}, int64[1] t = {{{MAX_TRACKED + 1}}}",
    )
    assert known_ints(value(model, "y")) == [7] * MAX_TRACKED
    assert known(value(model, "z")) is None
    big = np.zeros(MAX_TRACKED + 1, np.int64)
    assert known(ir.val("w", const_value=ir.tensor(big))) is None
    assert known(ir.val("w", const_value=ir.tensor(np.zeros(2, np.float32)))) is None


def test_initializers_get_dtype_and_shape_from_their_tensor():
    model = inferred("float[n, 4] x", "y = Add (x, w)", "float[4] w = {1, 2, 3, 4}")
    w = model.graph.initializers["w"]
    w.const_value = ir.tensor(np.zeros((1, 4), np.float16), name="w")
    infer_model(model)
    assert (w.dtype, w.shape) == (ir.DataType.FLOAT16, [1, 4])


# -- ops without a rule


def test_an_op_without_a_rule_is_asked_of_onnx():
    model = inferred("float[n, 3, 8, 8] x, float[5, 3, 3, 3] w", "y = Conv (x, w)")
    assert shape(model) == "n, 5, 6, 6"
    assert value(model).dtype == ir.DataType.FLOAT


def test_onnx_gets_constants_and_the_opset():
    model = inferred(
        "float[1, 2, 4, 4] x",
        "y = Resize (x, , s)",
        "float[4] s = {1, 1, 2, 2}",
        opset=13,
    )
    assert shape(model) == "1, 2, 8, 8"


def test_sequences_pass_through():
    model = inferred(
        "float[n, 4] x, int64 i",
        "s = SequenceConstruct (x, x) t = Identity (s) y = SequenceAt (t, i)",
    )
    assert isinstance(value(model, "t").type, ir.SequenceType)
    assert value(model).dtype == ir.DataType.FLOAT


def test_ops_of_other_domains_are_not_taken_for_onnx_ops():
    text = """<ir_version: 10, opset_import: ["" : 20, "com.example" : 1]>
    g (float[n, 4] x) => (float[n, 9] y, float[] z) {
        y = com.example.Transpose (x)
        z = Neg (y)
    }"""
    model = ir.from_onnx_text(text)
    value(model, "y").shape = ir.Shape([1, 2, 3])
    infer_model(model)
    assert shape(model, "z") is None  # nothing says what the stranger returns
    assert shape(model, "y") == "1, 2, 3"  # but an output keeps what it was declared to be


def test_target_ops_are_in_their_own_table():
    text = """<ir_version: 10, opset_import: ["" : 16]>
    g (float16[2, 8] x, float16[8] w, float16[n, 8] z) => (float16[] y, float16[] t) {
        y, rstd = NPURmsNorm (x, w)
        t, u = NPURmsNorm (z, w)
    }"""
    model = ir.from_onnx_text(text)
    infer_model(model)
    assert (shape(model, "y"), shape(model, "rstd")) == ("2, 8", "2, 1")
    assert value(model, "rstd").dtype == ir.DataType.FLOAT
    assert (shape(model, "t"), shape(model, "u")) == ("n, 8", "n, 1")


def test_a_target_op_may_lack_what_is_optional():
    text = """<ir_version: 10, opset_import: ["" : 16]>
    g (float16[2, 64] x, int8[64, 8] w, float16[8] scale, float16[8] bias) => (float16[] y) {
        y = NPUWeightQuantBatchMatmulV2 (x, w, scale, , , , bias)
    }"""
    model = ir.from_onnx_text(text)
    infer_model(model)
    assert (value(model, "y").dtype, shape(model, "y")) == (ir.DataType.FLOAT16, "2, 8")


def test_a_node_that_contradicts_its_op_is_unknown_and_said_so(caplog):
    with caplog.at_level(logging.WARNING, logger="omforge"):
        model = inferred("float[n, 4] x", "[bad] h = Transpose <perm = [0, 5]> (x) y = Neg (h)")
    assert (shape(model, "h"), shape(model, "y")) == (None, None)
    assert "no shape for Transpose bad" in caplog.text


def test_an_axis_that_the_tensor_does_not_have_is_unknown():
    assert shape(inferred("float[n, 4] x", "y = Softmax <axis = 7> (x)")) == "n, 4"
    assert shape(inferred("float[n, 4] x", "y, z = Split <axis = 7> (x)")) is None
    assert shape(inferred("float[n, 4] x", "y = ArgMax <axis = -3> (x)")) is None


def test_a_sparse_constant_is_not_read():
    """onnx-ir has no dense form of it, and would raise."""
    sparse = ir.node("Constant", [])
    sparse.attributes["sparse_value"] = ir.Attr(
        "sparse_value", ir.AttributeType.SPARSE_TENSOR, None
    )
    assert constant_tensor(sparse.outputs[0]) is None


def test_new_nodes_are_inferred_alone():
    model = inferred("float[n, 4] x", "y = Neg (x)")
    new = ir.node("Transpose", [value(model)])
    model.graph.append(new)
    infer_nodes([new])
    assert dims(new.outputs[0]) == (4, symbol("n"))
    loose = ir.node("Shape", [value(model)])  # in no graph: the latest opset
    infer_nodes([loose])
    assert [str(element) for element in known(loose.outputs[0])] == ["n", "4"]


def test_an_operator_that_takes_no_such_dtype_has_no_shape() -> None:
    """Onnx raises another error for that than for shapes that do not fit."""
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 18]>
        g (float16[2] x) => (y) { y, s, z = DynamicQuantizeLinear (x) }""")
    infer_model(model)
    assert model.graph.outputs[0].shape is None


@pytest.mark.parametrize(("default", "value"), [(1, [1]), (1.5, "x"), ("x", 1)])
def test_an_attribute_of_another_type_is_refused(default: object, value: object) -> None:
    """Where the operator has no schema, nobody else looks."""
    node = ir.node("MatMulNBits", [], {"K": value}, domain="com.microsoft", name="n")  # type: ignore[dict-item]
    with pytest.raises(ir.InputError, match=r"attribute K of com\.microsoft\.MatMulNBits n is of"):
        attribute(node, "K", default)
    assert attribute(node, "N", default) == default
    assert attribute(node, "K") is not None
