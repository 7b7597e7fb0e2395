"""Constants: hicann/ge:parser/parser/onnx/onnx_constant_parser.cc, onnx_file_constant_parser.cc."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tests.atc.sim.models import atc, model, refused, save

BODY = "(float[4] x) => (float[4] y) { y = Add (x, w) }"


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def with_weight(tensor: onnx.TensorProto) -> onnx.ModelProto:
    tensor.name = "w"
    proto = model(BODY)
    proto.graph.initializer.append(tensor)
    return proto


def external(**entries: str) -> onnx.ModelProto:
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return with_weight(tensor)


def test_raw_and_typed_data_are_read(tmp_path: Path) -> None:
    raw = numpy_helper.from_array(np.ones(4, np.float32))
    assert atc(save(with_weight(raw), tmp_path)).exit_status == 0
    typed = TensorProto(data_type=TensorProto.FLOAT, dims=[4], float_data=[1, 2, 3, 4])
    assert atc(save(with_weight(typed), tmp_path)).exit_status == 0


@pytest.mark.parametrize(
    ("tensor", "codes"),
    [
        # seen: "tensor_proto data type 21 is undefined"
        (TensorProto(data_type=TensorProto.UINT4, dims=[4], raw_data=b"ab"), ("E19999",)),
        # seen: fp8 has a GE type, and no value loader
        (TensorProto(data_type=TensorProto.FLOAT8E4M3FN, dims=[4], raw_data=b"abcd"), ("E19999",)),
        (TensorProto(data_type=TensorProto.FLOAT, dims=[4]), ("E19999",)),  # no data
        (TensorProto(data_type=TensorProto.FLOAT, dims=[-4], raw_data=b"a"), ("E19999",)),
        (TensorProto(data_type=TensorProto.INT4, dims=[4], int32_data=[1, 2]), ("SIM011",)),
        (TensorProto(data_type=TensorProto.FLOAT, dims=[4], float_data=[1, 2]), ("SIM012",)),
        (TensorProto(data_type=TensorProto.FLOAT, dims=[4], raw_data=b"abcd"), ("SIM013",)),
    ],
)
def test_constants_that_are_refused(
    tensor: onnx.TensorProto, codes: tuple[str, ...], tmp_path: Path
) -> None:
    assert refused(with_weight(tensor), tmp_path) == codes


def test_elements_are_counted_in_a_c_int(tmp_path: Path) -> None:
    tensor = TensorProto(data_type=TensorProto.INT8, dims=[1 << 16, 1 << 15], raw_data=b"a")
    assert "SIM010" in refused(with_weight(tensor), tmp_path)


def test_external_data(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.ones(4, np.float32).tobytes())
    good = external(location="w.bin", offset="0", length="16")
    result = atc(save(good, tmp_path), "--mode=3")
    assert result.exit_status == 0, result.text
    ops = json.loads((tmp_path / "check_result.json").read_text())["op"]
    assert {op["name"]: op["type"] for op in ops}["w_Initializer_0"] == "FileConstant"
    assert atc(save(good, tmp_path)).exit_status == 0


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        ({"location": "w.bin", "checksum": "abc"}, "E10001"),  # seen
        ({"offset": "0"}, "E19999"),  # no location
        ({"location": "w.bin", "length": "16", "checksum": "12"}, "SIM014"),
        ({"location": "/w.bin"}, "SIM015"),
        ({"location": "nothing.bin"}, "E13001"),  # not the parser's, but the reader's of weights
        ({"location": "w.bin", "offset": "8"}, "E13001"),
    ],
)
def test_external_data_that_is_refused(entries: dict[str, str], code: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    assert refused(external(**entries), tmp_path)[0] == code
