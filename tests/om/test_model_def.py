"""MODEL_DEF: what is written is read again, damage is refused, and names are found as GE does."""

import pytest

from omforge.ir.errors import InputError
from omforge.om import layout, model_def, read_om, write_om
from omforge.om.inout import OmTensor
from omforge.om.model_def import GraphDef, ModelDef, OpDef, TensorDesc

X = TensorDesc("float16", (2, -1), "ND", 64)
MODEL = ModelDef(
    "m",
    (
        GraphDef(
            "main",
            (
                OpDef("b", "Data", (), (X,), (X,), {"index": 1}),
                OpDef("a", "Data", (), (TensorDesc("int32", (3,), "NCHW"),), (), {"index": 0}),
                OpDef("add", "Add", ("b:0", "a:0"), (X, X), (X,), {"f": 0.5, "t": True, "n": -7}),
                OpDef("out", "NetOutput", ("add:0",), (X,), (), {}, ("add",), (0,), ("sub",)),
            ),
        ),
    ),
    {model_def.OUT_NODES: ("add:0:y",), "sizes": (1, -1)},
)


def encoded(model: ModelDef = MODEL) -> bytes:
    return model_def.encode(model)


def test_what_is_encoded_decodes():
    assert model_def.decode(memoryview(encoded()), "f") == MODEL


def test_inputs_are_in_the_order_of_their_index_and_outputs_have_their_names():
    found = model_def.in_out(MODEL)
    assert found.inputs == (
        OmTensor("a", "int32", (3,), 12, "NCHW"),
        OmTensor("b", "float16", (2, -1), 64),
    )
    assert found.outputs == (OmTensor("add:0:y", "float16", (2, -1), 64),)


def test_without_the_models_attribute_an_output_is_named_after_its_source():
    (output,) = model_def.in_out(ModelDef("m", MODEL.graphs)).outputs
    assert output.name == "output_0_add_0"


def test_the_shape_ahead_of_gears_is_the_inputs():
    op = OpDef("x", "Data", (), (X,), (), {model_def.ORIGIN_DIMS: (-1, 4)})
    (found,) = model_def.in_out(ModelDef("m", (GraphDef("g", (op,)),))).inputs
    assert found.shape == (-1, 4)


def test_a_file_without_the_partition_falls_back_to_the_graph(tmp_path):
    file = tmp_path / "old.om"
    write_om(file, name="m", inputs=[], outputs=[], partitions={layout.MODEL_DEF: encoded()})
    (model,) = read_om(file).models
    assert model.interface == "MODEL_DEF"
    assert [tensor.name for tensor in model.inputs] == ["a", "b"]


def test_every_cut_is_refused_or_ends_between_fields(tmp_path):
    data = encoded()
    refused = 0
    for length in range(len(data)):
        try:
            model_def.decode(memoryview(data[:length]), "f.om")
        except InputError as error:
            refused += str(error).startswith("f.om: MODEL_DEF is damaged")
    assert refused > 0.9 * len(data)


def test_unpacked_integers_and_unknown_fields_are_read():
    packed = bytes([0x1A, 0x03, 0x0A, 0x01, 0x10])  # shape {dim: [16]}
    loose = bytes([0x1A, 0x02, 0x08, 0x10])
    for shape in (packed, loose):
        desc = bytes([0x10, 0x07]) + shape + bytes([0xA2, 0x06, 0x01, 0x00])  # field 100
        op = bytes([0x0A, 1]) + b"x" + bytes([0x12, 4]) + b"Data"
        op += bytes([0x8A, 0x02, len(desc)]) + desc
        graph = bytes([0x32, len(op)]) + op
        decoded = model_def.decode(memoryview(bytes([0x3A, len(graph)]) + graph), "f")
        assert decoded.graphs[0].ops[0].input_desc == (TensorDesc("int32", (16,), ""),)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x0b", "no protobuf message"),  # a group that does not end
        (b"\xff" * 11, "no protobuf message"),  # a number of more than ten bytes
        (b"\x3a\x05\x00", "no protobuf message"),  # five bytes are promised, one is there
        (b"\x38\x01", "holds no graph"),  # a number where graphs are
        (b"", "holds no graph"),
    ],
)
def test_what_is_no_message(data, why):
    with pytest.raises(InputError, match=why):
        model_def.decode(memoryview(data), "f")
