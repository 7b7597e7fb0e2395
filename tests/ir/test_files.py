"""Loading and saving: what is refused and why, what a save leaves on disk, and what it costs."""

import errno
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from omforge import ir
from omforge.ir import weights

TEXT = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 64] x) => (float[N, 64] y) {
    h = MatMul (x, w)
    z = MatMul (h, w2)
    y = Add (z, b)
}"""


def matrix(seed: int = 0, size: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, size)).astype(np.float32)


def model_with(**initializers: np.ndarray) -> ir.Model:
    """`TEXT` with these weights; by default two different matrices and a bias."""
    proto = onnx.parser.parse_model(TEXT)
    arrays = {"w": matrix(0), "w2": matrix(1), "b": np.ones(64, np.float32), **initializers}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def stored(path: Path) -> dict[str, dict[str, str]]:
    """The external entries of a saved model, by tensor."""
    proto = onnx.load(path, load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.external_data
    }


def value_of(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def names(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


# -- load


def test_external_data_stays_on_disk(tmp_path):
    ir.save(model_with(), tmp_path / "m.onnx", external="m.weights")
    tensor = ir.load(tmp_path / "m.onnx").graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None  # not even mapped
    np.testing.assert_array_equal(tensor.numpy(), matrix(0))


def test_a_loaded_model_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    ir.save(model_with(), tmp_path / "m.onnx", external="m.weights")
    monkeypatch.chdir(tmp_path)
    model = ir.load("m.onnx")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(value_of(model, "w"), matrix(0))


def test_refuses_a_missing_path(tmp_path):
    with pytest.raises(ir.InputError, match=r"none\.onnx does not exist") as error:
        ir.load(tmp_path / "none.onnx")
    assert error.value.exit_status == 2


def test_refuses_a_folder_and_names_the_models_in_it(tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ir.InputError, match=r"is a folder.*model\.onnx"):
        ir.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an ONNX model: it is empty"),
        (b"hello, this is text", "not an ONNX model"),
        (b"\x80\x04pickle", "not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_refuses_what_is_no_model(tmp_path, content, message):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ir.InputError, match=message):
        ir.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_refuses_a_truncated_model(tmp_path, share):
    ir.save(model_with(), tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ir.InputError, match="truncated or corrupt"):
        ir.load(tmp_path / "m.onnx")


def test_names_every_missing_external_file(tmp_path):
    proto = ir.to_proto(model_with())
    for tensor, location in zip(proto.graph.initializer, ("a.bin", "b.bin", "b.bin"), strict=True):
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ir.InputError) as error:
        ir.load(tmp_path / "m.onnx")
    assert f"{tmp_path}/a.bin does not exist; it holds w\n" in str(error.value)
    assert f"{tmp_path}/b.bin does not exist; it holds w2 and 1 other tensors" in str(error.value)


def test_names_the_tensor_and_both_sizes_of_a_short_external_file(tmp_path):
    ir.save(model_with(), tmp_path / "m.onnx", external="m.weights")
    os.truncate(tmp_path / "m.weights", 20_000)
    with pytest.raises(ir.InputError, match=r"tensor w2: needs bytes 16384 to 32768.*has 20000"):
        ir.load(tmp_path / "m.onnx")


def test_refuses_a_length_that_disagrees_with_the_shape(tmp_path):
    ir.save(model_with(), tmp_path / "m.onnx", external="m.weights")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    entry = next(e for e in proto.graph.initializer[0].external_data if e.key == "length")
    entry.value = "1000"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ir.InputError, match=r"says 1000 bytes, FLOAT\[64,64\] needs 16384"):
        ir.load(tmp_path / "m.onnx")


def test_refuses_external_data_outside_the_models_folder(tmp_path):
    (tmp_path / "inner").mkdir()
    ir.save(model_with(), tmp_path / "m.onnx", external="m.weights")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../m.weights" if entry.key == "location" else entry.value
    (tmp_path / "inner" / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ir.InputError, match=r"'\.\./m\.weights' leads out of the folder"):
        ir.load(tmp_path / "inner" / "m.onnx")


def test_follows_the_links_of_a_hugging_face_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    ir.save(model_with(), blobs / "m.onnx", external="m.weights")
    (blobs / "m.onnx").rename(blobs / "1234")
    (blobs / "m.weights").rename(blobs / "5678")
    (snapshot / "m.onnx").symlink_to("../blobs/1234")
    (snapshot / "m.weights").symlink_to("../blobs/5678")
    np.testing.assert_array_equal(value_of(ir.load(snapshot / "m.onnx"), "w"), matrix(0))


def test_refuses_a_tensor_without_its_data(tmp_path):
    proto = ir.to_proto(model_with())
    proto.graph.initializer[1].ClearField("raw_data")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ir.InputError, match=r"tensor w2 has shape \[64, 64\] and no data"):
        ir.load(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"ir_version": 999}, "IR version 999"),
        ({"opset": 999}, "imports opset 999 of ai.onnx"),
        ({"opset": 0}, "imports opset 0"),
        ({"opset": (1 << 63) - 1}, "imports opset 9223372036854775807 of ai.onnx"),
        ({"opset": None}, "imports no opset"),
    ],
)
def test_refuses_versions_that_nobody_knows(tmp_path, field, message):
    proto = ir.to_proto(model_with())
    proto.ir_version = field.get("ir_version", proto.ir_version)
    if field.get("opset", 1) is None:
        del proto.opset_import[:]
    elif "opset" in field:
        proto.opset_import[0].version = field["opset"]
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ir.InputError, match=message):
        ir.load(tmp_path / "m.onnx")


def test_refuses_a_value_that_is_defined_twice(tmp_path):
    proto = ir.to_proto(model_with())
    proto.graph.node[1].output[0] = "h"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ir.InputError, match="MatMul -> h makes h, which MatMul -> h makes"):
        ir.load(tmp_path / "m.onnx")


# -- save


@pytest.mark.parametrize("external", [None, "m.weights"])
def test_round_trip(tmp_path, external):
    model = model_with()
    ir.save(model, tmp_path / "m.onnx", external=external)
    again = ir.load(tmp_path / "m.onnx")
    onnx.checker.check_model(tmp_path / "m.onnx")
    assert ir.to_text(again) == ir.to_text(model)


def test_same_model_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ir.save(model_with(), tmp_path / name / "m.onnx", external="m.weights")
    for file in ("m.onnx", "m.weights"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_external_entries_have_only_the_keys_that_atc_reads(tmp_path):
    ir.save(model_with(), tmp_path / "m.onnx", external="m.weights")
    assert stored(tmp_path / "m.onnx") == {
        "w": {"location": "m.weights", "offset": "0", "length": "16384"},
        "w2": {"location": "m.weights", "offset": "16384", "length": "16384"},
    }  # b has 256 bytes and stays inside


def test_equal_tensors_are_stored_once_and_large_ones_start_on_a_page(tmp_path):
    big = matrix(3, 512)  # 1 MiB
    model = model_with(w=big, w2=big.copy(), b=np.ones(257, np.float32))
    ir.save(model, tmp_path / "m.onnx", external="m.weights")
    entries = stored(tmp_path / "m.onnx")
    assert entries["w"] == entries["w2"]
    assert int(entries["b"]["offset"]) == 1 << 20
    assert (tmp_path / "m.weights").stat().st_size == (1 << 20) + 257 * 4

    ir.save(model_with(w=matrix(0)[:20], w2=big), tmp_path / "m.onnx", external="m.weights")
    assert stored(tmp_path / "m.onnx")["w2"]["offset"] == "8192"


def test_equal_bytes_of_another_shape_are_stored_once(tmp_path):
    model = model_with(w=matrix(0), w2=matrix(0).reshape(32, 128))
    ir.save(model, tmp_path / "m.onnx", external="m.weights")
    entries = stored(tmp_path / "m.onnx")
    assert entries["w"]["offset"] == entries["w2"]["offset"]
    assert tuple(ir.load(tmp_path / "m.onnx").graph.initializers["w2"].shape) == (32, 128)


def test_save_over_itself_keeps_file_and_loaded_model(tmp_path):
    ir.save(model_with(), tmp_path / "m.onnx", external="m.weights")
    model = ir.load(tmp_path / "m.onnx")
    # The bytes of w and w2 change places in the file that the model is mapped from.
    first, second = model.graph.initializers.pop("w"), model.graph.initializers.pop("w2")
    model.graph.initializers.add(second)
    model.graph.initializers.add(first)
    for _ in range(2):
        ir.save(model, tmp_path / "m.onnx", external="m.weights")
        assert stored(tmp_path / "m.onnx")["w2"]["offset"] == "0"
        for reader in (model, ir.load(tmp_path / "m.onnx")):
            np.testing.assert_array_equal(value_of(reader, "w"), matrix(0))
            np.testing.assert_array_equal(value_of(reader, "w2"), matrix(1))


def test_save_leaves_the_model_as_it_was(tmp_path):
    model = model_with()
    before = [value.const_value for value in model.graph.initializers.values()]
    ir.save(model, tmp_path / "m.onnx", external="m.weights")
    after = [value.const_value for value in model.graph.initializers.values()]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_external_weights_can_be_taken_inside(tmp_path):
    ir.save(model_with(), tmp_path / "m.onnx", external="m.weights")
    ir.save(ir.load(tmp_path / "m.onnx"), tmp_path / "single.onnx")
    (tmp_path / "m.weights").unlink()
    np.testing.assert_array_equal(value_of(ir.load(tmp_path / "single.onnx"), "w2"), matrix(1))


def test_int4_and_empty_tensors_survive(tmp_path):
    model = model_with()
    small = ir.tensor(np.arange(-8, 8).astype(ml_dtypes.int4), name="w2")
    model.graph.initializers["w2"].const_value = small
    model.graph.initializers["b"].const_value = ir.tensor(np.zeros((0, 3), np.float32), name="b")
    ir.save(model, tmp_path / "m.onnx", external="m.weights", threshold=0)
    again = ir.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(value_of(again, "w2").astype(int), np.arange(-8, 8))
    assert value_of(again, "b").shape == (0, 3)
    ir.save(again, tmp_path / "m.onnx", external="m.weights", threshold=0)
    np.testing.assert_array_equal(value_of(again, "w2").astype(int), np.arange(-8, 8))


def test_constants_and_subgraph_weights_go_outside_too(tmp_path):
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
g (bool c, float[2] x) => (float[2] y) {
    k = Constant <value = float[2] {1, 2}> ()
    y = If (c) <
        then_branch = a () => (float[2] t) <float[2] w = {5, 6}> { t = Add (k, w) },
        else_branch = b () => (float[2] e) { e = Identity (x) }>
}""")
    ir.save(model, tmp_path / "m.onnx", external="m.weights", threshold=8)
    assert (tmp_path / "m.weights").stat().st_size == 64 + 8
    again = ir.load(tmp_path / "m.onnx")
    found = {name: tensor.numpy().tolist() for name, tensor in ir.all_tensors(again)}
    assert found == {"Constant.value": [1, 2], "w": [5, 6]}


def test_two_graphs_share_one_writer(tmp_path):
    model = model_with()
    with ir.WeightWriter(tmp_path / "weights.bin") as writer:
        ir.save(model, tmp_path / "a.onnx", writer=writer)
        ir.save(model_with(), tmp_path / "b.onnx", writer=writer)
        assert names(tmp_path) == [names(tmp_path)[0], "a.onnx", "b.onnx"]  # and a hidden file
    assert names(tmp_path) == ["a.onnx", "b.onnx", "weights.bin"]
    assert stored(tmp_path / "a.onnx") == stored(tmp_path / "b.onnx")
    assert (tmp_path / "weights.bin").stat().st_size == 2 * 16384
    np.testing.assert_array_equal(value_of(ir.load(tmp_path / "b.onnx"), "w2"), matrix(1))


class Broken(ir.Tensor):
    """A tensor whose bytes cannot be had."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(matrix(0), name="w2")
        self.error = error

    def tobytes(self) -> bytes:
        raise self.error


@pytest.mark.parametrize("external", [None, "m.weights"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no bytes")])
def test_an_interrupted_save_leaves_everything_as_it_was(tmp_path, external, error):
    ir.save(model_with(), tmp_path / "m.onnx", external="m.weights")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    model = model_with(b=np.zeros(64, np.float32))
    model.graph.initializers["w2"].const_value = Broken(error)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        ir.save(model, tmp_path / "m.onnx", external=external)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_full_disk_is_reported_with_the_path_and_what_next(tmp_path, monkeypatch):
    def full(tensor: ir.TensorProtocol) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "chunks", full)
    with pytest.raises(ir.OmforgeError, match=r"m\.weights: No space left.*Free space") as error:
        ir.save(model_with(), tmp_path / "m.onnx", external="m.weights")
    assert isinstance(error.value.__cause__, OSError)
    assert names(tmp_path) == []


def test_a_writer_that_cannot_be_put_in_place_leaves_nothing(tmp_path):
    writer = ir.WeightWriter(tmp_path / "weights.bin")
    writer.add(ir.tensor(matrix(0)))
    (tmp_path / "weights.bin").mkdir()
    with pytest.raises(ir.OmforgeError, match=r"cannot write .*weights\.bin: Is a directory"):
        writer.close()
    assert names(tmp_path) == ["weights.bin"]


@pytest.mark.parametrize(
    ("path", "external", "message"),
    [
        ("none/m.onnx", None, "folder does not exist"),
        (".", None, "it is a folder"),
        ("m.onnx", "m.onnx", "another file in the model's folder"),
        ("m.onnx", "../m.weights", "Use a plain name such as m.weights"),
    ],
)
def test_refuses_a_bad_destination(tmp_path, path, external, message):
    with pytest.raises(ir.InputError, match=message):
        ir.save(model_with(), tmp_path / path, external=external)
    assert names(tmp_path) == []


def sparse_model(folder: Path, count: int, megabytes: int) -> Path:
    """A model whose external weights are the holes of a sparse file: all zeros, no disk space."""
    elements = megabytes << 18
    proto = ir.to_proto(model_with())
    for index in range(count):
        tensor = proto.graph.initializer.add(
            name=f"large{index}", data_type=1, dims=[elements - index], data_location=1
        )
        place = {"location": "zeros", "offset": index * elements * 4}
        for key, value in {**place, "length": (elements - index) * 4}.items():
            tensor.external_data.add(key=key, value=str(value))
    with open(folder / "zeros", "wb") as file:
        file.truncate(count * elements * 4)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def test_a_graph_of_two_gigabytes_is_refused_before_anything_is_read(tmp_path):
    model = ir.load(sparse_model(tmp_path, 3, 1000))
    with pytest.raises(ir.InputError, match=r"2 GiB.*Pass external='big\.weights'"):
        ir.save(model, tmp_path / "big.onnx")
    assert "big.onnx" not in names(tmp_path)


def test_weights_are_streamed(tmp_path):
    model = ir.load(sparse_model(tmp_path, 3, 48))
    tracemalloc.start()
    ir.save(model, tmp_path / "out.onnx", external="out.weights")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "out.weights").stat().st_size > 140 << 20
    assert peak < 4 * weights.CHUNK
