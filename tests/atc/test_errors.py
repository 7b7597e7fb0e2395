"""From atc's lines to diagnostics on our nodes."""

from pathlib import Path

import pytest

from omforge import ir
from omforge.air.files import read_air
from omforge.atc.errors import NodeNames, codes_of, diagnose, errors_of
from omforge.atc.sim.main import run
from tests.atc.sim.models import save

SAMPLES = Path(__file__).parent.parent / "air" / "samples"
MODEL = """
<ir_version: 8, opset_import: ["" : 16]>
agraph (float[1,4] x, float[4,4] w) => (float[1,4] y) {
    [a_proj] a = MatMul (x, w)
    [a_proj_bias] b = Add (a, a)
    y = Relu (b)
}
"""


def graph() -> ir.Model:
    model = ir.from_onnx_text(MODEL)
    model.graph[2].name = "/model/layers.3/mlp/Foo"
    return model


# As CANN 9.2 prints it (hicann/metadef:error_manager/error_manager.cc).
NEW = """ATC start working now, please wait for a moment.
...
ATC run failed, Please check the detail log, Try 'atc --help' for more information
[PID: 812] 2026-03-01-10:11:12.345.678 Not_Supported_Operator(E13010): No operator plugin is \
registered for Op: a_proj, optype: ai.onnx::16::MatMul.
        Solution: 1. If the operator is a custom operator, register related deliverables.
        TraceBack (most recent call last):
        No operator plugin is registered for Op: /model/layers.3/mlp/Foo, optype: ai.onnx::16::Foo.
        Model parse to graph failed, graph name:m.[FUNC:ModelParseToGraph][FILE:onnx_parser.cc]
"""

# As earlier releases print it.
OLD = """ATC run failed, Please check the detail log, Try 'atc --help' for more information
E13010: No operator plugin is registered for Op: a_proj, optype: ai.onnx::16::MatMul.
        Possible Cause: N/A
        TraceBack (most recent call last):
        No operator plugin is registered for Op: a_proj_bias, optype: ai.onnx::16::Add.
"""

KERNEL = """ATC run failed, Please check the detail log, Try 'atc --help' for more information
EZ9999: Inner Error!
EZ9999[PID: 9] 2026-03-01-10:11:12.345.678 (EZ9999):  Tiling failed for node a_proj_MatMulV2_0.
        TraceBack (most recent call last):
        op[a_proj_bias_ascend_mbatch_batch_2:Add] compile failed[FUNC:Build][FILE:op_compile.cc]
"""


def test_lines_are_read_in_the_order_they_stand_in() -> None:
    errors = errors_of(NEW.splitlines())
    assert [e.code for e in errors] == ["E13010", "E13010", "E19999"]
    assert errors[1].arguments == {
        "opname": "/model/layers.3/mlp/Foo",
        "optype": "ai.onnx::16::Foo",
    }
    assert [e.code for e in errors_of(OLD.splitlines())] == ["E13010", "E13010"]
    assert [e.code for e in errors_of(KERNEL.splitlines())] == ["EZ9999", "EZ9999"]


def test_what_is_no_error_is_left_out() -> None:
    lines = ["ATC start working now, please wait for a moment.", "...", "ATC run success", ""]
    assert errors_of(lines) == []
    warning = "[PID: 1] 2026-01-01-00:00:00.000.000 Performance(W11001): Op n does not hit the high"
    (found,) = errors_of([warning])
    assert found.is_warning
    assert diagnose([warning], None) == []


def test_diagnostics_name_our_nodes_and_their_layers() -> None:
    model = graph()
    first, second = diagnose(NEW.splitlines(), model)
    assert first.where == "MatMul a_proj"
    assert first.what == "atc has no ai.onnx::16::MatMul"
    assert second.where == "Relu /model/layers.3/mlp/Foo"
    assert "omforge check" in second.remedy
    tiling, built = diagnose(KERNEL.splitlines(), model)
    assert (tiling.code, tiling.where) == ("EZ9999", "MatMul a_proj")
    assert built.where == "Add a_proj_bias"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a_proj", "MatMul a_proj"),
        ("a_proj_Gemm_1", "MatMul a_proj"),  # a node that its plugin expanded
        ("a_proj_bias_suffix", "Add a_proj_bias"),  # the longest of ours, not a_proj
        ("a_proj_ascend_mbatch_batch_0", "MatMul a_proj"),
        ("graph_0_then/a_proj", "MatMul a_proj"),  # in a branch
        ("x", "input x"),
        ("xx", ""),
        ("a_projection", ""),
        ("trans_Cast_12", ""),  # a node that GE put in
    ],
)
def test_names_that_ge_makes(name: str, place: str) -> None:
    assert NodeNames(graph()).place(name) == place


def test_a_ge_graph_names_its_operators() -> None:
    air = read_air(SAMPLES / "minimal.air")
    said = [
        "E10041: Failed to load the model from b/minimal.air.",
        "EZ9999: [InferShape] Call InferShapeAndType for node:mm(MatMulV2) failed",
    ]
    loaded, inferred = diagnose(said, air)
    assert loaded.where == ""
    assert "in the bundle's folder" in loaded.remedy
    assert inferred.where == "MatMulV2 mm"
    assert NodeNames(air).place("x") == "input x"


def test_what_the_simulation_says_is_understood(tmp_path: Path) -> None:
    """Both sides state the texts on their own; the table of the registry is common."""
    path = save(
        "(float[1,4] x) => (float[1,4] y) { [one] a = Gelu (x) [two] y = Foo (a) }", tmp_path
    )
    flags = [
        f"--model={path}",
        "--framework=5",
        f"--output={tmp_path}/o",
        "--soc_version=Ascend310P3",
    ]
    report = f"--check_report={tmp_path}/check_result.json"
    result = run([*flags, report])
    found = diagnose(result.stdout.splitlines(), ir.load(path))
    assert [d.where for d in found[:2]] == ["Gelu one", "Foo two"]
    assert "E13010" in codes_of(result.stdout.splitlines())
    path = save("(int32[1,4] x) => (int32[1,4] y) { [one] y = Mod (x, x) }", tmp_path)
    (trap,) = diagnose(run([*flags, report]).stdout.splitlines(), ir.load(path))
    assert (trap.code, trap.where) == ("SIM024", "Mod one")


def test_of_two_codes_with_one_text_the_stated_one_counts() -> None:
    text = "Value x for parameter --weight is invalid. Reason: none"
    for code in ("E10001", "E10003"):
        (error,) = errors_of([f"{code}: {text}"])
        assert error.code == code
