"""What a run writes: the .om in atc's container and naming, and --mode=1 and --mode=6."""

import json
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from omforge.atc.sim.main import run
from omforge.om import GEAR_INPUT, read_om
from tests.atc.sim.models import RELU, atc, model, refused, save

GEARED = "(float[1,S] x, float[1,1,S] m) => (float[1,1,S] y) { y = Add (x, m) }"
SHAPES = "--input_shape=x:1,-1;m:1,1,-1"


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_names_shapes_and_sizes(tmp_path: Path) -> None:
    """hicann/ge:api/atc/omg.cc:CreateOutputNodesInfo: `<node>:<index>:<tensor>`."""
    assert atc(save(RELU, tmp_path)).exit_status == 0
    om = read_om(tmp_path / "out" / "model.om")
    assert om.simulated
    (x,), (y,) = om.models[0].inputs, om.models[0].outputs
    assert (x.name, x.dtype, x.shape, x.size) == ("x", "float32", (1, 4), 16)
    assert (y.name, y.shape) == ("Relu_0:0:y", (1, 4))


def test_gears_add_an_input(tmp_path: Path) -> None:
    flags = (SHAPES, "--dynamic_dims=1,1;8,8")
    result = atc(save(GEARED, tmp_path), *flags)
    assert result.exit_status == 0, result.text
    om = read_om(tmp_path / "out" / "model.om").models[0]
    assert [tensor.name for tensor in om.inputs] == ["x", "m", GEAR_INPUT]
    assert om.inputs[0].shape == (1, -1)
    assert om.gears == ((1, 1), (8, 8))


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ([SHAPES, "--dynamic_dims=1,1"], "E10035"),
        ([SHAPES, "--dynamic_dims=1,1;1,1"], "E10039"),
        (["--input_shape=x:1,-1", "--dynamic_dims=1;8"], "E10001"),  # m is not listed
        ([SHAPES, "--dynamic_dims=1,1;8,9"], "SIM062"),  # S would be 8 and 9
    ],
)
def test_gears_that_are_refused(flags: list[str], code: str, tmp_path: Path) -> None:
    assert refused(GEARED, tmp_path, *flags)[0] == code


def test_gears_of_high_rank_and_of_int8_models(tmp_path: Path) -> None:
    body = "(float[1,1,1,1,S] x) => (float[1,1,1,1,S] y) { y = Relu (x) }"
    flags = ("--input_shape=x:1,1,1,1,-1", "--dynamic_dims=1;8")
    assert refused(body, tmp_path, *flags) == ("SIM051",)
    body = "(float[1,S] x) => (int8[1,S] y) { y = AscendQuant <scale = 1.0, offset = 0.0> (x) }"
    assert refused(body, tmp_path, "--input_shape=x:1,-1", "--dynamic_dims=1;8") == ("SIM052",)


def test_more_gears_than_documented(tmp_path: Path) -> None:
    """CLI_options: 100 for 310P, A2 and A3, 256 for 950; E10036 is registered and not raised."""
    body = "(float[1,S] x) => (float[1,S] y) { y = Relu (x) }"
    gears = ";".join(str(size) for size in range(1, 102))
    flags = ("--input_shape=x:1,-1", f"--dynamic_dims={gears}")
    assert refused(body, tmp_path, *flags) == ("SIM053",)
    assert atc(save(body, tmp_path), *flags, "--soc_version=Ascend950PR").exit_status == 0


def test_ranges_are_not_for_310b(tmp_path: Path) -> None:
    body = "(float[1,S] x) => (float[1,S] y) { y = Relu (x) }"
    flags = ("--input_shape=x:1,1~8", "--soc_version=Ascend310B4")
    assert refused(body, tmp_path, *flags) == ("SIM050",)


@pytest.mark.parametrize(("external", "files"), [("0", 0), ("1", 1)])
def test_weights_stand_in_the_file_or_beside_it(external: str, files: int, tmp_path: Path) -> None:
    proto = model("(float[1,4] x) => (float[1,512] y) { y = MatMul (x, w) }")
    weight = np.arange(2048, dtype=np.float32).reshape(4, 512)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    result = atc(save(proto, tmp_path), f"--external_weight={external}")
    assert result.exit_status == 0, result.text
    made = list((tmp_path / "out" / "weight").glob("weight_*"))
    assert len(made) == files
    assert [file.read_bytes() for file in made] == [weight.tobytes()] * files


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    om = tmp_path / "out" / "model.om"
    atc(save(RELU, tmp_path))
    first = om.read_bytes()
    atc(save(RELU, tmp_path))
    assert om.read_bytes() == first


def test_what_is_not_simulated_is_said(tmp_path: Path) -> None:
    assert atc(save(RELU, tmp_path), "--precision_mode_v2=fp16").codes == ("SIM063",)
    assert atc(save(RELU, tmp_path), "--output_type=FP16").codes == ("SIM064",)
    assert refused(RELU, tmp_path, "--input_shape=x:1~2,4") == ("SIM061",)


def test_mode_6_displays_an_om(tmp_path: Path) -> None:
    atc(save(RELU, tmp_path))
    result = run(["--mode=6", "--om=out/model.om"])
    assert result.exit_status == 0
    assert "============ Display Model Info start ============" in result.text
    assert "Original Atc command line: atc --model=" in result.text
    assert "soc_version[Ascend310P3], framework_type[5]." in result.text
    assert run(["--mode=6"]).codes == ("E10004",)
    assert run(["--mode=6", "--om=out/model.om", "--framework=5"]).codes == ("E10057",)
    assert run(["--mode=6", f"--om={save(RELU, tmp_path).name}"]).codes == ("E10041",)
    shown = atc(save(RELU, tmp_path), "--display_model_info=1")
    assert "Display Model Info end" in shown.text


def test_mode_1_writes_json(tmp_path: Path) -> None:
    atc(save(RELU, tmp_path))
    assert run(["--mode=1", "--om=out/model.om", "--json=om.json"]).exit_status == 0
    content = json.loads((tmp_path / "om.json").read_text())
    assert [op["type"] for op in content["graphs"][0]["ops"]] == ["Data", "Relu", "NetOutput"]
    assert run(["--mode=1", "--om=model.onnx", "--json=g.json", "--framework=5"]).exit_status == 0
    assert json.loads((tmp_path / "g.json").read_text())["node"][0]["op_type"] == "Relu"
    assert run(["--mode=1"]).codes == ("E10004",)
    assert run(["--mode=1", "--om=x", "--json=y", "--framework=1"]).codes == ("E10001",)
    assert run(["--mode=5", "--om=x"]).codes == ("SIM000",)
