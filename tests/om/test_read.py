"""Reading .om files: both tables, several sub models, and everything that is no .om."""

import zipfile

import onnx
import pytest

from omforge.ir.errors import InputError
from omforge.om import OmTensor, read_om, write_om
from tests.om.samples import header, in_out, refused, sample, section


def written(tmp_path, data: bytes):
    file = tmp_path / "tiny.om"
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("wide", [True, False], ids=["64-bit", "32-bit"])
def test_a_file_of_two_sub_models(tmp_path, wide):
    data = sample(wide=wide)
    om = read_om(written(tmp_path, data))
    assert (om.name, om.platform_version, om.model_type, om.size) == (
        "tiny",
        "1.0",
        "ir",
        len(data),
    )
    assert om.table == ("64-bit" if wide else "32-bit")
    assert (om.is_dynamic, om.simulated) == (True, False)
    first, second = om.models
    assert [part.name for part in first.partitions] == [
        "MODEL_INOUT_INFO",
        "WEIGHTS_DATA",
        "TASK_INFO",
    ]
    assert bytes(om.partition(0, 1)) == b"weights"
    assert bytes(om.partition(1, 3)) == b"kernels"
    offset = first.partitions[1].offset
    assert data[offset : offset + 7] == b"weights"
    assert first.inputs == (
        OmTensor("x", "float16", (1, -1), 16),
        OmTensor("ascend_mbatch_shape_data", "int32", (1,), 4),
    )
    assert first.outputs == (OmTensor("add:0:y", "float32", (1, 8), 32),)
    assert first.gears == first.dynamic_dims == ((1,), (8,))
    assert first.input_order == ("x",)
    assert (first.interface, second.interface, second.inputs) == ("MODEL_INOUT_INFO", "", ())


def test_a_partition_that_is_not_there(tmp_path):
    om = read_om(written(tmp_path, sample()))
    with pytest.raises(InputError, match=r"no partition MODEL_DEF: it has MODEL_INOUT_INFO, "):
        om.partition(0, 0)


@pytest.mark.parametrize("wide", [True, False], ids=["64-bit", "32-bit"])
def test_a_file_cut_anywhere_is_refused(tmp_path, wide):
    data = sample(wide=wide)
    for length in range(len(data)):
        text = refused(written(tmp_path, data[:length]))
        assert str(tmp_path / "tiny.om") in text, length


@pytest.mark.parametrize("wide", [True, False], ids=["64-bit", "32-bit"])
def test_a_cut_file_whose_header_states_the_shorter_length_is_refused(tmp_path, wide):
    payload = sample(wide=wide)[256:]
    for length in range(1, len(payload)):
        cut = header(payload[:length], wide=wide, models=2) + payload[:length]
        text = refused(written(tmp_path, cut))
        assert "at byte " in text or "takes" in text, (length, text)


def test_damage_anywhere_is_refused_or_read_but_never_a_crash(tmp_path):
    data = sample()
    reasons: set[str] = set()
    for offset in range(len(data)):
        damaged = data[:offset] + bytes([data[offset] ^ 0xFF]) + data[offset + 1 :]
        try:
            read_om(written(tmp_path, damaged))
        except InputError as error:
            reasons.add(error.what.removeprefix(str(tmp_path)))
    assert {"/tiny.om is truncated or damaged", "/tiny.om is no .om file"} < reasons


def test_messages_name_the_offset_and_what_was_expected(tmp_path):
    payload = section([(1, b"weights")])
    file = written(tmp_path, header(payload, models=2) + payload)
    assert "at byte 295 there should be the partition table of sub model 1" in refused(file)
    file = written(tmp_path, header(payload + b"x") + payload + b"x")
    assert "at byte 295 there should be the end of the file, 1 bytes follow" in refused(file)
    file = written(tmp_path, header(payload) + payload[:-1])
    assert "states 39 bytes behind the first 256, there are 38" in refused(file)


def test_other_files(tmp_path):
    file = tmp_path / "model.onnx"
    onnx.save(
        onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 16]> g () => () {}'), file
    )
    assert "is no .om file: it starts with" in refused(file)
    assert "as an ONNX model does" in refused(file)
    archive = tmp_path / "model.om2"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("a", "b")
    assert "as a ZIP archive does" in refused(archive)
    assert "is empty" in refused(written(tmp_path, b""))
    assert "is a folder" in refused(tmp_path)
    assert "there is no such file" in refused(tmp_path / "missing.om")
    locked = bytearray(sample())
    locked[80] = 1
    assert "is encrypted" in refused(written(tmp_path, bytes(locked)))


def test_a_flow_model_has_the_wide_table_though_its_long_length_is_0(tmp_path):
    payload = section([(6, b"flow"), (7, b"an .om of its own")])
    data = bytearray(header(payload, wide=False, kind=3) + payload)
    om = read_om(written(tmp_path, bytes(data)))
    assert (om.model_type, om.table) == ("flow", "64-bit")
    assert [part.name for part in om.models[0].partitions] == ["FLOW_MODEL", "FLOW_SUBMODEL"]


def test_a_model_of_dynamic_batch(tmp_path):
    file = tmp_path / "batch.om"
    x = OmTensor("x", "float32", (-1, 4), 64)
    write_om(file, name="b", inputs=[x], outputs=[], partitions={2: b"t"}, dynamic_batch=(1, 4))
    model = read_om(file).models[0]
    assert (model.dynamic_batch, model.gears) == ((1, 4), ((1,), (4,)))


def test_the_dictionary_is_what_the_file_says(tmp_path):
    told = read_om(written(tmp_path, sample())).to_dict()
    assert told["models"][0]["inputs"][0] == {
        "name": "x",
        "dtype": "float16",
        "shape": [1, -1],
        "size": 16,
        "format": "ND",
        "ranges": [],
    }
    assert told["models"][0]["dynamic_dims"] == [[1], [8]]
    assert told["models"][0]["partitions"][0]["size"] == len(in_out())
