"""omforge air: what is in a GE graph."""

import json
from pathlib import Path

from typer.testing import CliRunner

from omforge.cli.app import app

SAMPLES = Path(__file__).parents[1] / "air" / "samples"


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["air", *arguments])
    return result.exit_code, result.output


def test_the_operators() -> None:
    status, text = run(str(SAMPLES / "decode.air"))
    assert status == 0
    assert "graph decode: 10 operators" in text
    assert "= Scatter(var=%k_cache, indices=%pos, updates=%k_new) {axis=-2, reduce=update}" in text


def test_how_often_each_is_there() -> None:
    status, text = run(str(SAMPLES / "decode.air"), "--types")
    assert status == 0
    assert text.splitlines()[:2] == ["Data                 4", "RefData              2"]


def test_as_data() -> None:
    status, text = run(str(SAMPLES / "minimal.air"), "--json")
    assert status == 0
    (graph,) = json.loads(text)["graphs"]
    norm = next(op for op in graph["operators"] if op["name"] == "norm")
    assert norm["inputs"] == {"x": "x:0", "gamma": "gamma:0"}
    assert norm["attributes"] == {"epsilon": "1e-05"}
    assert norm["outputs"]["rstd"] == {"dtype": "float32", "shape": [1, 1, 1]}


def test_what_is_no_graph(tmp_path: Path) -> None:
    file = tmp_path / "x.air"
    file.write_bytes(b"\x00\x01")
    status, text = run(str(file))
    assert status == 2
    assert "is no GE graph" in text
    assert run(str(tmp_path / "none.air"))[0] == 2
