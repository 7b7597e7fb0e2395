"""omforge air: what is in a GE graph; omforge check: whether it is legal."""

import json
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from omforge.air.files import read_air, write_air
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


def check(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", *arguments])
    return result.exit_code, result.output


def test_check_of_a_legal_graph() -> None:
    status, text = check(str(SAMPLES / "decode.air"), "--target", "Ascend310P3")
    assert status == 0
    assert "decode.air: legal for Ascend310P3, 10 nodes" in text


def test_check_of_an_illegal_graph() -> None:
    """310B has no fused operators: the offences are grouped, with code, reason and remedy."""
    file = str(SAMPLES / "decode.air")
    status, text = check(file, "--target", "Ascend310B4")
    assert status == 1
    assert "2 x 310b has no kernel for Scatter [air-kernel, EZ3003]\n    at Scatter write_k" in text
    assert "decode.air: 3 offences for Ascend310B4 in 10 nodes" in text
    status, text = check(file, "--target", "Ascend310B4", "--json")
    assert status == 1
    told = json.loads(text)
    assert not told["legal"]
    assert {offence["code"] for offence in told["diagnostics"]} == {"air-kernel"}


def test_check_of_what_is_no_graph(tmp_path: Path) -> None:
    file = tmp_path / "x.air"
    file.write_bytes(b"\x00\x01")
    status, text = check(str(file), "--target", "Ascend310P3")
    assert status == 2
    assert "is no GE graph" in text


def test_check_shows_no_control_characters(tmp_path: Path) -> None:
    air = read_air(SAMPLES / "minimal.air")
    ops = tuple(
        replace(op, name="\x1b[2Jnorm", type="\x1bX") if op.name == "norm" else op
        for op in air.graph.ops
    )
    write_air(replace(air, graphs=(replace(air.graph, ops=ops),)), tmp_path / "x.air")
    status, text = check(str(tmp_path / "x.air"), "--target", "Ascend310P3")
    assert status == 1
    assert "GE has no operator \\x1bX [air-op-known" in text
    assert "\x1b" not in text
