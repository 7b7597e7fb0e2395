"""What atc checks ahead of the model: hicann/ge:api/atc/main_impl.cc, option_utils.cc, util.cc."""

import json
from pathlib import Path

import pytest

from omforge.atc.sim.main import run
from omforge.atc.sim.paths import valid
from tests.atc.sim.models import RELU, atc, refused, save


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # check_result.json is written to the working folder


def test_a_run_that_succeeds(tmp_path: Path) -> None:
    result = atc(save(RELU, tmp_path))
    assert result.exit_status == 0
    assert result.codes == ()
    assert result.stdout.splitlines()[:3] == [
        "ATC start working now, please wait for a moment.",
        "...",
        "ATC run success, welcome to the next use.",
    ]
    assert (tmp_path / "out" / "model.om").is_file()


@pytest.mark.parametrize("flag", ["--model=", "--output=", "--soc_version="])
def test_what_is_required(flag: str, tmp_path: Path) -> None:
    """main_impl.cc:IsRequiredParameterExists."""
    assert refused(RELU, tmp_path, flag) == ("E10054",)


def test_the_framework_is_required(tmp_path: Path) -> None:
    model = save(RELU, tmp_path)
    result = run([f"--model={model}", "--output=o", "--soc_version=Ascend310P3"])
    assert result.codes == ("E10007",)
    assert run(["--framework=0", "--mode=0"]).codes == ("E10008",)  # Caffe needs --weight


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--input_format=NHWC"], "E10001"),
        (["--precision_mode=force_fp16", "--precision_mode_v2=fp16"], "E10056"),
        (["--modify_mixlist=m.json"], "E10001"),  # with origin, which mixes nothing
        (["--is_weight_clip=2"], "E10006"),
        (["--op_precision_mode=nothing.ini"], "E10001"),
        (["--optypelist_for_implmode=Add"], "E10001"),
        (["--deterministic_level=1"], "E10001"),  # without --deterministic=1
        (["--auto_tune_mode=RL"], "E10001"),
        (["--compression_optimize_conf=c.cfg"], "E10001"),  # AMCT is not installed
        (["--save_original_model=yes"], "E10005"),
        (["--enable_single_stream=1"], "E10005"),
        (["--allow_hf32=on"], "E10005"),
        (["--quant_dumpable=true"], "E10006"),
        (["--enable_compress_weight=true", "--compress_weight_conf=conf"], "E10047"),
        (["--host_env_os=windows"], "E10001"),
        (["--host_env_cpu=riscv"], "E10001"),
        (["--keep_dtype=nothing.cfg"], "E10001"),
        (["--output_type=FP4"], "E10001"),
        (["--insert_op_conf=conf", "--dynamic_dims=1;2", "--input_shape=x:-1,4"], "E10001"),
        (["--raw_ge_options=bad.json"], "E10032"),
        (["--soc_version=Ascend035"], "E10055"),  # with --mode=30 only
        (["--soc_version=Ascend310P9"], "E20101"),
        (["--singleop=s.json"], "SIM000"),
        (["--framework=3"], "SIM000"),
    ],
)
def test_refusals(flags: list[str], code: str, tmp_path: Path) -> None:
    (tmp_path / "conf").write_text("")
    (tmp_path / "bad.json").write_text("{")
    assert refused(RELU, tmp_path, *flags)[0] == code


def test_raw_options_are_an_object(tmp_path: Path) -> None:
    (tmp_path / "raw.json").write_text(json.dumps({"run options": {}}))
    assert refused(RELU, tmp_path, "--raw_ge_options=raw.json") == ("E10032",)
    (tmp_path / "raw.json").write_text(json.dumps({"compile options": {"global": {}}}))
    assert atc(save(RELU, tmp_path), "--raw_ge_options=raw.json").exit_status == 0


@pytest.mark.parametrize("path", ["a b", "a+b", "a@b", "a=b", "a:b", "é"])
def test_characters_of_paths(path: str, tmp_path: Path) -> None:
    """util.cc:IsPathCharsValid, asked of the real path of an input and the written one of --output."""
    assert not valid(path)
    folder = tmp_path / path
    folder.mkdir()
    model = save(RELU, folder)
    link = tmp_path / "link.onnx"
    link.symlink_to(model)
    assert atc(link, f"--output={tmp_path}/o").codes == ("E10001",)
    assert refused(RELU, tmp_path, f"--output={path}/o") == ("E10001",)


def test_chinese_paths_are_fine(tmp_path: Path) -> None:
    (tmp_path / "模型").mkdir()
    assert atc(save(RELU, tmp_path / "模型")).exit_status == 0


def test_other_faults_of_paths(tmp_path: Path) -> None:
    assert refused(RELU, tmp_path, "--model=nothing.onnx") == ("E10001",)
    assert refused(RELU, tmp_path, "--output=out/") == ("E10022",)
    assert refused(RELU, tmp_path, f"--output={'o' * 4096}") == ("E10001",)
    (tmp_path / "file").write_text("")
    assert refused(RELU, tmp_path, "--output=file/o") == ("E10001",)
