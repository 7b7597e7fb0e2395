"""What `omforge check` shows."""

from pathlib import Path

import onnx

from omforge.lowering.legality import check_file
from omforge.lowering.legality.report import lines, to_json
from omforge.lowering.target import target

SOC = target("Ascend310P3")


def write(folder: Path, body: str) -> Path:
    text = f'<ir_version: 8, opset_import: ["" : 16]> g (float[2] x) => (float[2] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_fault_at_many_places_is_one_entry(tmp_path: Path) -> None:
    chain = " ".join(f"t{i + 1} = FooBar (t{i})" for i in range(7)).replace("(t0)", "(x)")
    path = write(tmp_path, f"{chain} y = Neg (t7)")
    assert lines(check_file(path, SOC)) == [
        "7 x no plugin for FooBar at opset 16 [registered, E13010]",
        "    at FooBar n0",
        "    at FooBar n1",
        "    at FooBar n2",
        "    at FooBar n3",
        "    at FooBar n4",
        "    and 2 more",
        "    why: ATC registers it at no opset; atc: E13010 "
        "(hicann/ge:parser/parser/onnx/onnx_parser.cc)",
        "    do: rewrite it in operators that ATC registers",
        "",
        f"{path}: 7 offences for Ascend310P3 in 8 nodes",
    ]
    assert "    at FooBar n6" in lines(check_file(path, SOC), all_places=True)


def test_a_legal_model_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, "y = Neg (x)")
    assert lines(check_file(path, SOC)) == [f"{path}: legal for Ascend310P3, 1 nodes"]


def test_json_has_every_place_and_the_source(tmp_path: Path) -> None:
    path = write(tmp_path, "h = FooBar (x) y = FooBar (h)")
    told = to_json(check_file(path, SOC))
    assert (told["legal"], told["nodes"], told["target"]) == (False, 2, "Ascend310P3")
    assert [entry["where"] for entry in told["diagnostics"]] == ["FooBar n0", "FooBar n1"]
    assert told["diagnostics"][0]["atc"] == "E13010"
    assert told["diagnostics"][0]["source"] == "hicann/ge:parser/parser/onnx/onnx_parser.cc"
