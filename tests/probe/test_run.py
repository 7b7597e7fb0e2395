"""The whole way: a kit, its runner as processes, a facts file; also where there is no omforge."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import omforge
from omforge.ir.errors import CheckError, InputError
from omforge.lowering.facts_file import read_facts
from omforge.lowering.target import TARGETS
from omforge.probe.results import read_result
from omforge.probe.run import ProbeOptions, run_probes

SOC = TARGETS["Ascend310P3"]
PACKAGE = Path(omforge.__file__).parent


def test_the_simulators_answer_and_their_answers_are_no_facts(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    options = ProbeOptions("sim", "sim", only=("copy-2d-within-device",))
    found, file = run_probes(SOC, options, tmp_path / "facts.json", lambda *t: told.append(t))
    answers = {answer.probe: answer.value for answer in found.answers}
    assert answers == {"onnx-taken": "taken", "runs": "right", "copy-2d-within-device": "right"}
    assert sorted(told)[-1][1:] == (3, 3) or (3, 3) in [each[1:] for each in told]
    assert json.loads(file.read_text())["simulated"] is True
    assert os.listdir(tmp_path) == ["facts.json"]
    with pytest.raises(InputError, match="says nothing of a device"):
        read_facts(file, SOC)


def test_what_an_atc_says_becomes_facts(
    atc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ProbeOptions(str(atc), "none", only=("air-taken", "never-made", "runs"))
    monkeypatch.chdir(tmp_path)
    found, file = run_probes(SOC, options)
    assert file.name == "facts-unknown-Ascend310P3.json"
    facts = read_facts(file, SOC)
    assert facts.is_seen("air-taken=taken")
    assert facts.is_seen("never-made=taken")
    assert "runs" not in facts.seen  # it was built, and no device was asked
    assert [each.probe for each in found.surprises] == ["never-made"]
    monkeypatch.setenv("PLANT", "EZ3003")  # an atc that lacks the SoC's operators
    with pytest.raises(CheckError, match=r"does not compile one MatMul.*EZ3003: Planted"):
        run_probes(SOC, options, tmp_path / "none.json")
    monkeypatch.setenv("PLANT", "E10054")  # the command is wrong: nothing follows
    with pytest.raises(CheckError, match="no probe gave an answer"):
        run_probes(SOC, options, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_names_and_an_absent_atc_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="there is no probe 'nothing'"):
        run_probes(SOC, ProbeOptions("sim", only=("nothing",)))
    with pytest.raises(
        InputError, match="there is no probe 'fused-infer-attention' for Ascend310P3"
    ):
        run_probes(SOC, ProbeOptions("sim", only=("fused-infer-attention",)))
    monkeypatch.setattr("omforge.probe.run.choose_atc", lambda _: None)
    with pytest.raises(InputError, match="atc was not found"):
        run_probes(SOC, ProbeOptions())
    monkeypatch.undo()
    with pytest.raises(InputError, match="atc refuses the path"):
        run_probes(SOC, ProbeOptions("sim"), tmp_path / "a b.json")


def test_a_kit_runs_where_there_is_no_omforge(
    kits: dict[str, Path], atc: Path, tmp_path: Path
) -> None:
    """-I: neither the working folder nor PYTHONPATH. With the simulated acl it runs a model."""
    kit = kits["Ascend310P3"]
    words = ["--target", "Ascend310P3", "--only", "air-taken", "--work", str(tmp_path / "work")]
    words += ["-o", str(tmp_path / "result.json")]
    command = [sys.executable, "-I", str(kit / "probe.py"), *words, "--atc", str(atc)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--backend", "none"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "air-taken: taken (atc built it)" in done.stdout
    found = read_result(tmp_path / "result.json")
    assert not found.simulated
    assert found.write(tmp_path / "facts.json").is_file()

    simulated = f'exec {sys.executable} -m omforge.atc.sim "$@"\n'
    (tmp_path / "atc").write_text(f"#!/bin/sh\n{simulated}")
    (tmp_path / "atc").chmod(0o755)
    path = os.pathsep.join((str(PACKAGE / "probe" / "simulated"), str(PACKAGE.parent)))
    script = [str(kit / "probe.sh"), *words[2:4], "--only", "runs", *words[4:]]
    done = subprocess.run(
        [*script, "--atc", str(tmp_path / "atc"), "--again"],
        env={**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "runs: right (the numbers are those of 'right')" in done.stdout
    assert read_result(tmp_path / "result.json").simulated


def result(**change: Any) -> dict[str, Any]:
    answer = {"value": "taken", "number": None, "evidence": "", "simulated": False}
    return {
        "schema": 1,
        "soc": "Ascend310P3",
        "cann": "8.1.RC1",
        "complete": True,
        "simulated": False,
        "answers": {"onnx-taken": answer},
    } | change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"complete": False}, "was interrupted"),
        (
            {"answers": {"onnx-taken": {"value": "maybe", "evidence": ""}}},
            "it may have refused, taken",
        ),
        ({"answers": {"something": {"value": None, "evidence": ""}}}, "is no probe of Ascend310P3"),
        ({"answers": None}, "is no result of a kit"),
        ({"soc": "Ascend1"}, "is not known"),
    ],
)
def test_a_result_that_is_none_is_refused(tmp_path: Path, change: Any, told: str) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result(**change)))
    with pytest.raises(InputError) as raised:
        read_result(tmp_path / "result.json")
    assert told in str(raised.value)
