"""source: where the graph, the config and the tokenizer of an export are."""

from pathlib import Path

import pytest

from omforge import ir
from omforge.bundle.source import find_source
from omforge.testing import parse


def _touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


def test_a_file_is_its_own_graph(tmp_path: Path) -> None:
    _touch(tmp_path / "a.onnx", tmp_path / "b.onnx", tmp_path / "config.json")
    found = find_source(tmp_path / "a.onnx")
    assert (found.graph, found.folder) == (tmp_path / "a.onnx", tmp_path)
    assert found.companions() == [tmp_path / "config.json"]


def test_a_folder_with_one_graph(tmp_path: Path) -> None:
    _touch(tmp_path / "llm.onnx", tmp_path / "tokenizer.json")
    found = find_source(tmp_path)
    assert found.graph.name == "llm.onnx"
    assert [file.name for file in found.companions()] == ["tokenizer.json"]


def test_the_usual_name_wins_among_several(tmp_path: Path) -> None:
    _touch(tmp_path / "encoder.onnx", tmp_path / "model.onnx")
    assert find_source(tmp_path).graph.name == "model.onnx"


def test_a_graph_one_level_down(tmp_path: Path) -> None:
    _touch(tmp_path / "onnx" / "model.onnx", tmp_path / "config.json")
    assert find_source(tmp_path).folder == tmp_path
    assert find_source(tmp_path / "onnx" / "model.onnx").folder == tmp_path


def test_several_graphs_of_no_known_name_are_refused(tmp_path: Path) -> None:
    text = (
        '<ir_version: 11, opset_import: ["" : 24]> g (float[2] x) => (float[2] y) { y = Neg (x) }'
    )
    for name in ("a.onnx", "b.onnx"):
        ir.save(parse(text), tmp_path / name)
    with pytest.raises(ir.InputError, match=r"a\.onnx, b\.onnx"):
        find_source(tmp_path)
    (tmp_path / "b.onnx").write_bytes(b"x")
    with pytest.raises(ir.InputError, match=r"b\.onnx is not an ONNX model"):
        find_source(tmp_path)


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ir.InputError, match=r"holds no \.onnx file"):
        find_source(tmp_path)
    with pytest.raises(ir.InputError, match="does not exist"):
        find_source(tmp_path / "nowhere")
