"""What looks wrong and is taken: by CANN's own parser (seen), so by our check and the simulator."""

from pathlib import Path

import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from omforge.atc.sim.main import run
from omforge.lowering.legality import check_file
from omforge.lowering.target import target
from tests.lowering.illegal_parts import Source, rename_all, rename_node

SOC = "Ascend310P3"
CHAIN = "g (float16[4] x) => (float16[4] y) { h = Relu (x) y = Neg (h) }"


def too_long(proto: ModelProto) -> None:
    """A weight with more bytes than its dims say: the rest is not read."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT16, dims=[4], raw_data=bytes(16))
    proto.graph.initializer.append(tensor)
    proto.graph.node[0].op_type = "Add"
    proto.graph.node[0].input.append("w")


def same_names(proto: ModelProto) -> None:
    for attribute in proto.graph.node[0].attribute:
        attribute.g.node[0].name = "/layer/Op"


def with_default(proto: ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2]))


CASES: dict[str, tuple[Source, set[str]]] = {
    "equal names in two branches": (
        Source(
            """g (float[2,3] x, bool c) => (float[2,3] y) { y = If (c) <
                then_branch = t () => (float[2,3] p) { p = Add (x, x) },
                else_branch = e () => (float[2,3] q) { q = Mul (x, x) }> }""",
            same_names,
        ),
        set(),
    ),
    "an input with an initializer": (
        Source(
            "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add (x, w) }", with_default
        ),
        {"input-initializers"},
    ),
    "raw data that are too long": (Source(CHAIN, too_long), set()),
    "Clip with its bounds as attributes, and with none, at opset 10": (
        Source(
            """<ir_version: 8, opset_import: ["" : 10]> g (float[4] x) => (float[4] y)
            { h = Clip <min = 0.0, max = 0.5> (x) y = Clip (h) }"""
        ),
        set(),
    ),
    "Mod with fmod": (
        Source("g (float[4] x, float[4] z) => (float[4] y) { y = Mod <fmod = 1> (x, z) }"),
        set(),
    ),
    "Gemm with alpha and with C": (
        Source(
            """g (float[2,3] x, float[3,4] w, float[4] c) => (float[2,4] y)
            { y = Gemm <alpha = 0.5> (x, w, c) }"""
        ),
        set(),
    ),
    "a node with the name of what gathers the outputs": (
        Source(CHAIN, rename_node(0, "Node_Output")),
        {"inner-names"},
    ),
    "a node named like a part of another": (
        Source(
            "g (float16[2,3] x, int32[1] i) => (float16[1,3] y) { h = Gather (x, i) y = Neg (h) }",
            rename_all("a", "PartitionedCall_a_gatherv2_3"),
        ),
        {"inner-names"},
    ),
    "an index of OneHot that may be beyond its depth": (
        Source(
            """g (int32[2] x) => (float[2,3] y) <int32 d = {3}, float[2] v = {0, 1}>
            { y = OneHot (x, d, v) }"""
        ),
        {"one-hot-range"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_both_take_it(name: str, tmp_path: Path) -> None:
    source, advice = CASES[name]
    path = source.write(tmp_path)
    found = check_file(path, target(SOC))
    assert found.errors == ()
    assert {offence.code for offence in found.advice} == advice
    flags = [f"--output={tmp_path}/out/model", f"--soc_version={SOC}", "--framework=5"]
    result = run([f"--model={path}", *flags])
    assert result.exit_status == 0, result.text


def test_names_are_taken_once_in_each_graph(tmp_path: Path) -> None:
    source, _ = CASES["equal names in two branches"]

    def twice(proto: onnx.ModelProto) -> None:
        same_names(proto)
        branch = proto.graph.node[0].attribute[0].g
        branch.node.add().CopyFrom(branch.node[0])
        branch.node[1].output[0] = "other"

    path = Source(source.text, twice).write(tmp_path)
    assert {error.atc for error in check_file(path, target(SOC)).errors} == {"E13009"}
    report = f"--check_report={tmp_path}/check_result.json"
    flags = [f"--output={tmp_path}/out/model", f"--soc_version={SOC}", "--framework=5", report]
    assert "E13009" in run([f"--model={path}", *flags]).codes
