"""`omforge probe`: the table, the list, the kit, and a result that is brought back."""

import json
from pathlib import Path

import pytest

from tests.cli.test_app import Result
from tests.probe.conftest import PLANTED_ATC

SOC = "Ascend310P3"


@pytest.fixture
def atc(tmp_path: Path) -> Path:
    (tmp_path / "atc").write_text(PLANTED_ATC)
    (tmp_path / "atc").chmod(0o755)
    return tmp_path / "atc"


def test_probe_shows_fact_expected_seen_and_evidence(atc: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    done = Result(
        *("probe", "--target", SOC, "--atc", atc, "--backend", "none"),
        *("--only", "never-made", "--only", "runs", "-o", facts),
    )
    assert done.status == 0, done.err
    lines = [line.split(maxsplit=3) for line in done.out.splitlines()]
    assert lines[0] == ["fact", "expected", "seen", "evidence"]
    assert lines[1] == ["onnx-taken", "taken", "taken", "atc built it"]
    assert lines[2] == ["runs", "right", "-", "atc built it; no device was asked"]
    assert lines[3] == ["never-made", "refused", "taken", "atc built it"]
    assert "not as expected: never-made is taken: the rule holds: atc says nothing" in done.out
    assert done.out.endswith(f"{facts}: 2 of 3 questions answered by {SOC}\n")
    assert json.loads(facts.read_text())["answers"]["never-made"]["value"] == "taken"


def test_probe_lists_what_each_settles() -> None:
    done = Result("probe", "--list", "--target", SOC)
    row = next(line for line in done.out.splitlines() if line.startswith("zero-element-pse"))
    assert "device" in row
    assert "form Attention=NPUPromptFlashAttention" in row
    listed = Result("probe", "--list", "--json").json["probes"]
    assert all(each["settles"] and each["means"] for each in listed)


def test_probe_exports_a_kit_once(tmp_path: Path) -> None:
    done = Result("probe", "--target", SOC, "--export", tmp_path / "kit")
    assert done.status == 0
    assert {p.name for p in (tmp_path / "kit").iterdir()} == {
        "kit.json",
        "models",
        "probe.py",
        "probe.sh",
    }
    again = Result("probe", "--target", SOC, "--export", tmp_path / "kit")
    assert again.status == 2
    assert "a kit is written into a new folder" in again.err


def test_probe_reads_a_result(tmp_path: Path) -> None:
    answer = {"value": "taken", "number": None, "evidence": "atc built it", "simulated": False}
    document = {"schema": 1, "soc": SOC, "cann": "8.5", "complete": True, "simulated": False}
    (tmp_path / "result.json").write_text(
        json.dumps(document | {"answers": {"onnx-taken": answer}})
    )
    facts = tmp_path / f"facts-8.5-{SOC}.json"
    done = Result("probe", "--read", tmp_path / "result.json", "-o", facts, "--json")
    assert done.json["answers"]["onnx-taken"]["value"] == "taken"
    assert json.loads(facts.read_text())["cann"] == "8.5"


def test_probe_without_a_target_names_those_that_are_known() -> None:
    done = Result("probe", "--atc", "sim")
    assert done.status == 2
    assert "Ascend310P3" in done.err
