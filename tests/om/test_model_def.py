"""MODEL_DEF: decoded without protobuf's generated code, and checked against protobuf itself."""

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

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
        (b"\x0b", "wire type 3"),
        (b"\xff" * 11, "more than ten bytes"),
        (b"\x3a\x05\x00", "takes 5 bytes, 1 are left"),
        (b"\x38\x01", "is a number, not a message"),
    ],
)
def test_what_is_no_message(data, why):
    with pytest.raises(InputError, match=why):
        model_def.decode(memoryview(data), "f")


def test_protobuf_reads_what_is_written():
    """The field numbers and wire types of graph_metadef/proto/ge_ir.proto, as far as written."""
    graph = message_factory.GetMessageClass(_pool().FindMessageTypeByName("ge.Model"))()
    graph.ParseFromString(encoded())
    assert graph.name == "m"
    ops = graph.graph[0].op
    assert [(op.name, op.type, op.id) for op in ops] == [
        ("b", "Data", 0),
        ("a", "Data", 1),
        ("add", "Add", 2),
        ("out", "NetOutput", 3),
    ]
    assert list(ops[2].input) == ["b:0", "a:0"]
    assert list(ops[0].input_desc[0].shape.dim) == [2, -1]
    assert (ops[0].input_desc[0].dtype, ops[0].input_desc[0].size) == (2, 64)
    assert graph.SerializeToString(deterministic=True)


def _pool() -> descriptor_pool.DescriptorPool:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="ge.proto", package="ge", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, bool, str]) -> None:
        made = file.message_type.add(name=name)
        for field, number, kind, repeated, of in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            made.field.add(name=field, number=number, type=kind, label=label, type_name=of or None)

    text, whole, nested = kinds.TYPE_STRING, kinds.TYPE_INT64, kinds.TYPE_MESSAGE
    message("Shape", ("dim", 1, whole, True, ""))
    message(
        "Desc",
        ("dtype", 2, kinds.TYPE_INT32, False, ""),
        ("shape", 3, nested, False, ".ge.Shape"),
        ("layout", 4, text, False, ""),
        ("size", 10, whole, False, ""),
    )
    message(
        "Op",
        ("name", 1, text, False, ""),
        ("type", 2, text, False, ""),
        ("input", 5, text, True, ""),
        ("id", 21, whole, False, ""),
        ("input_desc", 33, nested, True, ".ge.Desc"),
    )
    message("Graph", ("name", 1, text, False, ""), ("op", 6, nested, True, ".ge.Op"))
    message("Model", ("name", 1, text, False, ""), ("graph", 7, nested, True, ".ge.Graph"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool
