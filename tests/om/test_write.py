"""Writing .om files: what is written reads back, and is laid out as CANN lays it out."""

import struct

import pytest

from omforge.ir.errors import InputError
from omforge.om import OmTensor, read_om, write_om

X = OmTensor("x", "float16", (1, -1), 16)
Y = OmTensor("add:0:y", "int8", (1, 8), 8, "NCHW", ((1, 1), (1, 8)))


def write(file, **changed):
    arguments = {"name": "m", "inputs": [X], "outputs": [Y], "partitions": {1: b"w", 2: b"tt"}}
    write_om(file, **(arguments | changed))
    return read_om(file)


@pytest.mark.parametrize("table", ["64-bit", "32-bit"])
def test_what_is_written_reads_back(tmp_path, table):
    om = write(
        tmp_path / "a.om",
        table=table,
        gears=((1,), (8,)),
        input_order=("x",),
        output_shapes=((0, 0, 1, 1), (1, 0, 1, 8)),
        submodels=({3: b"k"},),
        platform_version="omforge-atc-sim",
        is_dynamic=True,
    )
    assert (om.name, om.table, om.simulated, om.is_dynamic) == ("m", table, True, True)
    first, second = om.models
    assert (first.inputs, first.outputs) == ((X,), (Y,))
    assert first.gears == ((1,), (8,))
    assert first.output_shapes == ((0, 0, 1, 1), (1, 0, 1, 8))
    assert [part.name for part in second.partitions] == ["TBE_KERNELS"]
    assert bytes(om.partition(0, 2)) == b"tt"


def test_the_bytes_are_the_structs_of_cann(tmp_path):
    write(tmp_path / "a.om", inputs=[], outputs=[])
    data = (tmp_path / "a.om").read_bytes()
    assert data[:12] == b"IMOD" + struct.pack("<II", 256, 0x20000000)
    assert data[84:86] == b"m\0"
    assert struct.unpack_from("<I", data, 156) == (1,)
    assert struct.unpack_from("<Q", data, 184) == (len(data) - 256,)
    assert struct.unpack_from("<I4xI4xQQI4xQQ", data, 256) == (2, 1, 0, 1, 2, 1, 2)
    assert data[256 + 8 + 48 :] == b"wtt"


def test_the_same_arguments_give_the_same_bytes_and_nothing_else_is_left(tmp_path):
    write(tmp_path / "a.om")
    write(tmp_path / "b.om")
    assert (tmp_path / "a.om").read_bytes() == (tmp_path / "b.om").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.om", "b.om"]


def test_long_names_lose_their_end(tmp_path):
    assert write(tmp_path / "a.om", name="n" * 40).name == "n" * 32


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="a sub model has no partition"):
        write(tmp_path / "a.om", inputs=[], outputs=[], partitions={})
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path / "missing" / "a.om")
    assert not list(tmp_path.iterdir())
