"""Where `opt` writes: links are followed, devices and pipes written, stdout taken, or nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from omforge.cli.app import app

TEXT = """<ir_version: 10, opset_import: ["" : 18]>
g (float[2] x) => (float[2] y) { h = Identity (x) y = Neg (h) }"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "m.onnx").write_bytes(onnx.parser.parse_model(TEXT).SerializeToString())
    return folder / "m.onnx"


def opt(*words: object, status: int = 0) -> tuple[bytes, str]:
    """Stdout and stderr of a run of one pass."""
    found = CliRunner().invoke(app, ["opt", "-p", "remove-no-ops", *map(str, words)])
    assert found.exit_code == status, found.stderr
    return found.stdout_bytes, found.stderr


def operators(content: bytes) -> list[str]:
    return [node.op_type for node in onnx.ModelProto.FromString(content).graph.node]


@pytest.mark.parametrize("target", ["there", "not yet"])
def test_a_link_is_followed_and_stays(source: Path, tmp_path: Path, target: str) -> None:
    store, link = tmp_path / "store", tmp_path / "link.onnx"
    store.mkdir()
    if target == "there":
        (store / "m.onnx").write_bytes(b"old")
    link.symlink_to(store / "m.onnx")
    opt(source, "-o", link)
    assert link.is_symlink()
    assert operators((store / "m.onnx").read_bytes()) == ["Neg"]
    assert [child.name for child in store.iterdir()] == ["m.onnx"]


def test_weights_go_where_the_link_leads_and_are_found_there(source: Path, tmp_path: Path) -> None:
    model = onnx.load(source)
    weight = onnx.numpy_helper.from_array(np.ones((600, 2), np.float32), "w")
    model.graph.initializer.append(weight)
    model.graph.node[1].CopyFrom(onnx.helper.make_node("Add", ["h", "w"], ["y"]))
    onnx.save(model, source, save_as_external_data=True, location="w", size_threshold=0)
    store, link = tmp_path / "store", tmp_path / "link.onnx"
    store.mkdir()
    link.symlink_to(store / "m.onnx")
    opt(source, "-o", link)
    assert sorted(child.name for child in store.iterdir()) == ["m.onnx", "m.onnx.data"]
    opt(link)  # reads what it wrote


@pytest.mark.parametrize("place", ["-", "/dev/stdout"])
def test_stdout_gets_the_model_and_nothing_else(source: Path, place: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "omforge", "opt", source, "-p", "remove-no-ops", "-o", place]
    done = subprocess.run(words, capture_output=True, check=True, timeout=60)
    assert operators(done.stdout) == ["Neg"]
    assert b"remove-no-ops" in done.stderr
    with (tmp_path / "o.onnx").open("wb") as file:
        subprocess.run(words, stdout=file, stderr=subprocess.DEVNULL, check=True, timeout=60)
    assert operators((tmp_path / "o.onnx").read_bytes()) == ["Neg"]


def test_a_device_is_written_and_not_replaced(source: Path) -> None:
    before = os.stat("/dev/null")
    opt(source, "-o", "/dev/null")
    assert os.path.samestat(before, os.stat("/dev/null"))
    assert os.stat("/dev/null").st_rdev == before.st_rdev


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_device_that_takes_nothing_is_named(source: Path) -> None:
    assert "error: cannot write /dev/full" in opt(source, "-o", "/dev/full", status=1)[1]


def test_a_pipe_is_written(source: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        opt(source, "-o", pipe)
        assert reader.stdout is not None
        assert operators(reader.stdout.read()) == ["Neg"]
    assert pipe.is_fifo()


def test_without_a_place_the_passes_run_and_are_shown(source: Path, tmp_path: Path) -> None:
    out, _ = opt(source, "--print-after", "remove-no-ops")
    assert b"remove-no-ops" in out
    assert json.loads(opt(source, "--json")[0])["passes"][0]["rewrites"] == 1
    assert [child.name for child in tmp_path.iterdir()] == ["in"]


def test_json_and_the_model_do_not_share_stdout(source: Path) -> None:
    assert "would both go to stdout" in opt(source, "-o", "-", "--json", status=2)[1]
