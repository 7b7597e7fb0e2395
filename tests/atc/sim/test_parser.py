"""The ONNX parser: hicann/ge:parser/parser/onnx/onnx_parser.cc and its neighbours.

"seen" marks what CANN's own parser was seen to do with such a model.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from omforge.atc.sim.parser import FILE_LIMIT
from omforge.om import read_om
from omforge.om.payload import read_payload
from tests.atc.sim.models import RELU, atc, model, refused, save


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def text(what: str | onnx.ModelProto, folder: Path, *flags: str, opset: int | str = 16) -> str:
    return atc(save(what, folder, opset), *flags).text


@pytest.mark.parametrize("opset", [11, 13, 14, 17, 18])
def test_opsets_that_parse(opset: int, tmp_path: Path) -> None:
    assert atc(save(RELU, tmp_path, opset)).exit_status == 0


@pytest.mark.parametrize("opset", [7, 19, 20, 21, 24])
def test_an_operator_is_looked_up_by_the_exact_opset(opset: int, tmp_path: Path) -> None:
    assert refused(RELU, tmp_path, opset=opset) == ("E13010", "E19999")
    name = f"No operator plugin is registered for Op: Relu_0, optype: ai.onnx::{opset}::Relu."
    assert name in text(RELU, tmp_path, opset=opset)


def test_every_failing_node_is_listed_dead_ones_too(tmp_path: Path) -> None:
    body = """(float[1,4] x) => (float[1,4] y) {
        a = FooBar (x)
        y = Relu (x)
        b = Gelu (a)
    }"""
    told = text(body, tmp_path)
    assert (
        "Not_Supported_Operator(E13010): No operator plugin is registered for Op: FooBar_0" in told
    )
    assert "        No operator plugin is registered for Op: Gelu_2" in told
    report = json.loads((tmp_path / "check_result.json").read_text())
    assert report["result"] == "failed"
    assert (report["total"], report["pass"], report["fail"]) == (4, 2, 2)
    assert report["op"][0] == {
        "name": "FooBar_0",
        "type": "ai.onnx::16::FooBar",
        "result": "failed",
        "cause": [{"code": 1, "message": "The type is not supported."}],
    }
    assert report["op"][3] == {"name": "x", "type": "Input", "result": "success"}


def test_mode_3_writes_the_report_only(tmp_path: Path) -> None:
    result = atc(save(RELU, tmp_path), "--mode=3", "--check_report=report.json")
    assert result.exit_status == 0
    assert json.loads((tmp_path / "report.json").read_text())["result"] == "success"
    assert not (tmp_path / "out").exists()
    assert atc(save(RELU, tmp_path, 20), "--mode=3", "--check_report=r.json").exit_status == 255


@pytest.mark.parametrize(
    "body",
    [
        "Loop (x)",
        "Gelu (x)",
        "QuantizeLinear (x, x)",
        "RMSNormalization (x, x)",
        "Attention (x, x, x)",
    ],
)
def test_operators_without_a_plugin(body: str, tmp_path: Path) -> None:
    assert refused(f"(float[1,4] x) => (float[1,4] y) {{ y = {body} }}", tmp_path)[0] == "E13010"


def test_domains(tmp_path: Path) -> None:
    body = "(float[1,4] x, float[4] g) => (float[1,4] y) { y = npu.NPURmsNorm (x, g) }"
    both = '"ai.onnx" : 16, "npu" : 1'
    assert atc(save(body, tmp_path, both)).exit_status == 0
    assert refused(body, tmp_path, opset='"" : 16, "npu" : 2')[0] == "E13010"
    assert refused(body, tmp_path) == ("E19999",)
    assert "The opset of domain[npu] has no responding version." in text(body, tmp_path)
    # The weight-quant operator has another name there (seen).
    body = (
        "(float16[1,4] x, int8[4,4] w, float16[4] s) => (float16[1,4] y) { y = npu.%s (x, w, s) }"
    )
    good = atc(save(body % "WeightQuantBatchMatmulV2", tmp_path, both))
    assert good.exit_status == 0, good.text
    assert refused(body % "NPUWeightQuantBatchMatmulV2", tmp_path, opset=both)[0] == "E13010"


def test_older_releases_take_one_import_where_a_node_has_no_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hicann/ge:docs/zh/user_guides/error_codes (E16005): registered, no longer raised."""
    assert refused(RELU, tmp_path, opset='"" : 16, "npu" : 1')[0] == "E16005"
    monkeypatch.setenv("OMFORGE_ATC_SIM_RELEASE", "9")
    assert atc(save(RELU, tmp_path, '"" : 16, "npu" : 1')).exit_status == 0


def test_functions_are_ignored(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 16, "local" : 1]>
        agraph (float[1,4] x) => (float[1,4] y) { y = local.double (x) }
        <domain: "local", opset_import: ["" : 16]> double (a) => (b) { b = Add (a, a) }
    """)
    assert refused(proto, tmp_path)[0] == "E13010"


def test_names_are_unique(tmp_path: Path) -> None:
    proto = model("(float[1,4] x) => (float[1,4] y) { a = Relu (x) y = Relu (a) }")
    proto.graph.node[0].name = proto.graph.node[1].name = "same"
    assert refused(proto, tmp_path) == ("E13009", "E19999")
    report = json.loads((tmp_path / "check_result.json").read_text())
    assert [op["result"] for op in report["op"]] == ["failed", "failed", "success"]
    assert report["op"][0]["cause"][0]["code"] == 9


@pytest.mark.parametrize(
    "name",
    [
        "x",  # a graph input
        "Relu_0",  # the automatic name of the first unnamed node
        "w_Initializer_0",  # the automatic name of a constant
    ],
)
def test_a_node_named_like_an_implicit_one(name: str, tmp_path: Path) -> None:
    proto = model("(float[1,4] x) => (float[1,4] y) { a = Relu (x) y = Add (a, w) }")
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "w"))
    proto.graph.node[1].name = name
    assert refused(proto, tmp_path)[0] == "E13009"


def test_inputs_and_outputs(tmp_path: Path) -> None:
    proto = model("() => (float[4] y) { y = Relu (w) }")
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "w"))
    assert refused(proto, tmp_path) == ("E16001", "E19999")
    proto = model(RELU)
    del proto.graph.output[:]
    assert refused(proto, tmp_path)[0] == "E16001"
    assert "The model has no output node." in text(proto, tmp_path)
    proto = model(RELU)
    proto.graph.output[0].name = "nothing"
    assert refused(proto, tmp_path) == ("E19999",)
    proto = onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 16)])
    assert refused(proto, tmp_path) == ("E16004",)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.touch()
    assert atc(path).codes == ("E13015", "E19999")
    with path.open("wb") as stream:
        stream.truncate(FILE_LIMIT + 1)  # a hole, no bytes on the disk
    assert atc(path).codes == ("E13015", "E19999")
    path.write_bytes(b"no protobuf")
    assert atc(path).codes == ("E13005", "E19999")


def test_shapes_of_inputs(tmp_path: Path) -> None:
    body = "(float[B,4] x) => (float[B,4] y) { y = Relu (x) }"
    assert refused(body, tmp_path) == ("E10001",)  # omg.cc:CheckInputShapeNode
    assert atc(save(body, tmp_path), "--input_shape=x:2,4").exit_status == 0
    assert refused(body, tmp_path, "--input_shape=x:2") == ("E19999",)  # another rank
    assert refused(body, tmp_path, "--input_shape=x:2,4;z:1") == ("E10016",)
    assert refused(body, tmp_path, "--input_shape=x:2,4;Relu_0:1") == ("E10017",)
    assert refused(body, tmp_path, "--input_shape=x:2,5") == ("SIM030",)
    assert refused("(float[0,4] x) => (float[0,4] y) { y = Relu (x) }", tmp_path) == ("SIM032",)


def test_an_input_without_a_shape_is_a_scalar(tmp_path: Path) -> None:
    proto = model(RELU)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    assert refused(proto, tmp_path) == ("SIM031",)


def test_silent_failures_may_be_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMFORGE_ATC_SIM_STRICT", "0")
    body = "(int32[1,4] x) => (int32[1,4] y) { y = Mod (x, x) }"
    result = atc(save(body, tmp_path))
    assert (result.exit_status, result.codes) == (0, ("SIM024",))
    assert "ATC run success" in result.text


def test_an_attribute_without_a_type_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMFORGE_ATC_SIM_STRICT", "0")
    proto = model("(float[1,4] x) => (float[1,4] y) { y = Softmax <axis = 0> (x) }")
    proto.graph.node[0].attribute[0].ClearField("type")
    result = atc(save(proto, tmp_path))
    assert (result.exit_status, result.codes) == (0, ("SIM027",))


def test_dtypes_of_inputs(tmp_path: Path) -> None:
    proto = model(RELU)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT4
    assert refused(proto, tmp_path) == ("E19999",)
    assert "tensor_proto data type 21 is undefined." in text(proto, tmp_path)


def test_constants_are_read_from_value_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """(float[1,4] x) => (float[4] y) {
        shape = Constant <value_ints = [4]> ()
        y = Reshape (x, shape)
    }"""
    assert refused(body, tmp_path) == ("SIM033",)
    monkeypatch.setenv("OMFORGE_ATC_SIM_STRICT", "0")
    assert atc(save(body, tmp_path)).codes == ("SIM033",)
    payload = read_payload(read_om(tmp_path / "out" / "model.om"))
    (value,) = onnx.load_from_string(bytes(payload.graphs[0])).graph.node[0].attribute
    assert list(value.t.dims) == [0]  # what runs is wrong, as it would be


def test_edges(tmp_path: Path) -> None:
    proto = model("(float[1,4] x) => (float[1,4] y) { y = Add (x, z) }")
    assert refused(proto, tmp_path) == ("SIM037",)  # nothing makes z
    proto = model("(float[1,4] x) => (float[1,4] y) { y = Relu (x) y = Abs (x) }")
    assert refused(proto, tmp_path) == ("SIM035",)  # two make y
    assert refused("(float[1,4] x) => (float[1,4] x) { y = Relu (x) }", tmp_path) == ("SIM039",)
    proto = model(RELU)
    proto.graph.output.append(proto.graph.output[0])
    assert refused(proto, tmp_path) == ("SIM039",)


def test_an_output_without_a_name_captures_absent_inputs(tmp_path: Path) -> None:
    body = """(float[1,8] x, float[4] high) => (float[1,8] y) {
        y = Clip (x, , high)
        b, = TopK (x, k)
    }"""
    proto = model(body.replace("b, =", "b, c ="))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1]), "k"))
    proto.graph.node[1].output[1] = ""
    assert refused(proto, tmp_path) == ("SIM036",)


def test_more_inputs_and_outputs_than_the_operator_has(tmp_path: Path) -> None:
    proto = model(RELU)
    proto.graph.node[0].input.append("x")
    assert refused(proto, tmp_path) == ("E19999",)
    assert "Resolve operator IO name failed, tensor[x]" in text(proto, tmp_path)
    body = "(float[1,4] x) => (float[1,4] y) { a, b = Relu (x) y = Abs (b) }"
    assert refused(body, tmp_path) == ("E19999",)


IF = """(float[1,4] x, bool c) => (float[1,4] y) {
    y = If (c) <
        then_branch = yes () => (float[1,4] a) { a = Relu (x) },
        else_branch = no () => (float[1,4] b) { b = Abs (x) }
    >
}"""


def test_if_captures_outer_tensors(tmp_path: Path) -> None:
    """subgraph_adapter/if_subgraph_adapter.cc."""
    assert atc(save(IF, tmp_path)).exit_status == 0
    assert refused(IF.replace("Abs", "Gelu"), tmp_path)[0] == "E13010"
    assert refused(IF.replace("else_branch", "other_branch"), tmp_path) == ("E19999",)
    proto = model(IF)
    proto.graph.node[0].attribute.append(helper.make_attribute("more", 1))
    assert "if node attribute size:3 must be 2." in text(proto, tmp_path)


def test_external_data_in_a_branch_is_not_found(tmp_path: Path) -> None:
    """SetExternalPath mends the paths of the root graph only."""
    proto = model(IF.replace("Relu (x)", "Add (x, w)"))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    proto.graph.node[0].attribute[0].g.initializer.append(tensor)
    assert refused(proto, tmp_path) == ("SIM034",)


def test_names_in_a_branch_are_its_own(tmp_path: Path) -> None:
    proto = model(IF)
    for attribute in proto.graph.node[0].attribute:
        attribute.g.node[0].name = "same"
    assert atc(save(proto, tmp_path)).exit_status == 0


def test_out_nodes(tmp_path: Path) -> None:
    """hicann/ge:api/atc/omg.cc:ParseOutNodes, SetOutputNodeInfo."""
    assert refused(RELU, tmp_path, "--out_nodes=nothing:0") == ("E10016",)
    assert refused(RELU, tmp_path, "--out_nodes=Relu_0:1") == ("E10003",)
    assert refused(RELU, tmp_path, "--out_nodes=Relu_0:x") == ("E10001",)
    assert refused(RELU, tmp_path, "--out_nodes=z") == ("E19999",)
    assert atc(save(RELU, tmp_path), "--out_nodes=Relu_0:0").codes == ("SIM060",)
