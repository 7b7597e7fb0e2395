"""Facts: read, refused when they are none, and what is claimed of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from omforge.ir.errors import InputError
from omforge.lowering.facts import NOTHING_SEEN, Facts, Seen, find_facts, read_facts
from omforge.lowering.target import TARGETS

SOC = TARGETS["Ascend310P3"]


def document(**answers: str) -> dict[str, Any]:
    """A facts file of 310P3."""
    return {
        "schema": 1,
        "soc": "Ascend310P3",
        "cann": "8.1.RC1",
        "simulated": False,
        "answers": {
            name.replace("_", "-"): {"value": value, "number": None, "evidence": "planted"}
            for name, value in answers.items()
        },
    }


def written(folder: Path, data: Any, name: str = "facts.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / name


def test_a_claim_holds_fails_or_is_open(tmp_path: Path) -> None:
    file = written(tmp_path, document(air_taken="taken", zero_element_pse="wrong"))
    facts = read_facts(file, SOC)
    assert len(facts.sha256) == 64
    verdict = facts.verdict("zero-element-pse=right")
    assert verdict is not None
    assert not verdict.holds
    assert verdict.words == (
        "seen on Ascend310P3 with CANN 8.1.RC1: zero-element-pse is wrong (planted)"
    )
    taken = facts.verdict("air-taken=refused|taken")
    assert taken is not None
    assert taken.holds
    assert facts.verdict("cache-in-place=in-place") is None
    form = facts.of("form", "Attention=NPUPromptFlashAttention")
    assert form == verdict
    assert facts.of("form", "no such form") is None
    assert NOTHING_SEEN.of("form", "Attention=NPUPromptFlashAttention") is None


def test_the_front_is_air_only_where_the_device_has_shown_all_of_it() -> None:
    right = {
        "air-taken": "taken",
        "cache-in-place": "in-place",
        "two-models-one-cache": "right",
    }
    seen = {name: Seen(value, "") for name, value in right.items()}
    assert Facts("Ascend310P3", seen=seen).front == "air"
    assert NOTHING_SEEN.front == "onnx"
    for name in right:
        assert Facts("Ascend310P3", seen=seen | {name: Seen("lost", "")}).front == "onnx"


def test_no_answer_is_no_fact(tmp_path: Path) -> None:
    data = document()
    data["answers"]["runs"] = {"value": None, "number": None, "evidence": "no device"}
    assert read_facts(written(tmp_path, data), SOC).seen == {}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"simulated": True}, "its answers are the simulator's"),
        ({"simulated": None}, "its answers are the simulator's"),
        ({"soc": "Ascend910B4"}, "Ascend310P3 is of another family (310p)"),
        ({"soc": "Ascend1"}, "Ascend1"),
        ({"soc": 7}, "soc, cann or answers is missing"),
        ({"schema": 2}, "its schema is 2, not 1"),
        ({"answers": []}, "soc, cann or answers is missing"),
        ({"answers": {"runs": {"value": 1, "evidence": ""}}}, "the answer of runs is none"),
        ({"answers": {"runs": "right"}}, "the answer of runs is none"),
        ({"answers": {"runs": {"value": "right", "evidence": "", "number": True}}}, "is none"),
    ],
)
def test_what_is_no_facts_file_is_refused(tmp_path: Path, change: Any, told: str) -> None:
    file = written(tmp_path, document(air_taken="taken") | change)
    with pytest.raises(InputError) as raised:
        read_facts(file, SOC)
    assert told in str(raised.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", '"facts"', "[" * 100_000])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        read_facts(written(tmp_path, text), SOC)
    with pytest.raises(InputError):
        read_facts(tmp_path / "absent.json", SOC)


def test_a_soc_of_the_same_family_has_the_same_kernels(tmp_path: Path) -> None:
    file = written(tmp_path, document(air_taken="taken"))
    assert read_facts(file, TARGETS["Ascend310P1"]).soc == "Ascend310P3"


def test_facts_are_found_by_soc_in_the_users_folder(tmp_path: Path) -> None:
    written(tmp_path / "omforge", document(), "facts-8.1.RC1-Ascend310P3.json")
    written(tmp_path / "omforge", document(), "facts-8.1.RC1-Ascend910B4.json")
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    found = find_facts(SOC, environment)
    assert [path.name for path in found] == ["facts-8.1.RC1-Ascend310P3.json"]
    assert find_facts(TARGETS["Ascend310P1"], environment) == ()
