"""Reading and writing .air files. The samples were taken by GE's own loader."""

import dataclasses
from pathlib import Path

import pytest

from omforge.air import files, graph, messages
from omforge.air.graph import Air, Attr, Desc, Graph, Op, Tensor
from omforge.ir.errors import InputError

SAMPLES = sorted((Path(__file__).parent / "samples").glob("*.air"))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
def test_a_sample_is_read_and_written_again_byte_for_byte(sample, tmp_path):
    air = files.read_air(sample)
    files.write_air(air, tmp_path / "again.air")
    assert (tmp_path / "again.air").read_bytes() == sample.read_bytes()


def test_what_a_sample_says():
    decode = files.read_air(SAMPLES[0]).graph
    ops = decode.by_name()
    assert ops["k_cache"].type == "RefData"
    assert ops["k_cache"].attributes["index"] == graph.integer(4)
    assert ops["k_cache"].output_desc[0].shape == (1, 4, 256, 64)
    write = ops["write_k"]
    assert write.inputs == ("k_cache:0", "pos:0", "k_new:0")
    assert write.attributes["reduce"] == graph.text("update")
    attention = ops["attn"]
    assert [edge is not None for edge in attention.edges] == [True] * 3 + [False] * 12
    assert attention.input_desc[5].dtype == "undefined"


ATTRIBUTES = {
    "s": graph.text("ü:\udc80"),  # bytes that are no UTF-8 come back as they were
    "i": graph.integer(-1),
    "f": graph.number(0.125),
    "b": graph.boolean(False),
    "dt": graph.dtype("bfloat16"),
    "t": graph.tensor(Tensor(Desc("", "int32", (2,)), b"\1\0\0\0\2\0\0\0")),
    "scalar": graph.tensor(Tensor(Desc("", "float16", ()), b"\0\0")),
    "li": graph.integers((1, -2)),
    "empty": graph.integers(()),
    "ls": graph.texts(("x", "")),
    "dropped by GE": graph.texts(("x",), typed=False),
    "td": Attr("td", Desc("y", "int4", (8, -1))),
    "lt": Attr("t", items=(Tensor(Desc("", "bool", (1,)), b"\1"),)),
    "ldt": Attr("dt", items=("float16", "int8")),
    "nothing": Attr("none"),
}


def model(**fields) -> Air:
    op = Op("o", "Add", ("a:0", "", "b:-1"), (Desc("x1", "float16", (2,)),), (Desc("y"),), **fields)
    return Air("m", (Graph("g", (op,), ("a:0",), ("o:0",)),))


def test_every_kind_of_attribute_comes_back():
    air = model(attributes=ATTRIBUTES)
    assert files.decode(files.encode(air), "m") == air


def test_the_same_graph_gives_the_same_bytes_whatever_the_order_of_its_attributes():
    backwards = dict(reversed(ATTRIBUTES.items()))
    assert files.encode(model(attributes=ATTRIBUTES)) == files.encode(model(attributes=backwards))


def test_what_has_no_name_here_is_kept():
    """Fields of a later CANN, and kinds of attributes that omforge does not take apart."""
    message = messages.new("ModelDef")
    message.ParseFromString(files.encode(model()))
    op = message.graph[0].op[0]
    op.workspace.append(7)
    op.attr["pairs"].list_list_int.list_list_i.add().list_i.append(3)
    later = bytes([0xFA, 0x07, 0x01, 0x2A])  # field 127, one byte
    data = message.SerializeToString(deterministic=True) + later
    air = files.decode(data, "m")
    assert files.encode(air) == data
    assert air.graph.ops[0].attributes["pairs"].kind == "raw"


def test_a_control_edge_takes_no_slot():
    op = model().graph.ops[0]
    assert op.edges == (graph.Edge("a", 0), None)
    assert op.controls == ("b",)
    assert graph.parse_edge("layer:0/x:2") == graph.Edge("layer:0/x", 2)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x0a\xff", "its bytes are no protobuf message"),
        (b"", "it holds no graph"),
        (b"\x0a\x01m\x10\x01", "it holds no graph"),
    ],
)
def test_what_is_no_graph_is_refused(tmp_path, content, why):
    file = tmp_path / "m.air"
    file.write_bytes(content)
    with pytest.raises(InputError, match="is no GE graph") as error:
        files.read_air(file)
    assert why in str(error.value)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    whole = SAMPLES[0].read_bytes()
    file = tmp_path / "m.air"
    for size in range(1, len(whole), 97):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match="is no GE graph"):
            files.read_air(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        files.read_air(tmp_path / "m.air")


def test_a_file_that_protobuf_could_not_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(messages, "LIMIT", 10)
    with pytest.raises(InputError, match="more than 2 GiB"):
        files.write_air(model(), tmp_path / "m.air")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_changed_is_written_as_changed():
    air = files.read_air(SAMPLES[0])
    ops = tuple(dataclasses.replace(op, name=f"{op.name}2") for op in air.graph.ops)
    changed = dataclasses.replace(air, graphs=(dataclasses.replace(air.graph, ops=ops),))
    assert files.decode(files.encode(changed), "m") == changed
