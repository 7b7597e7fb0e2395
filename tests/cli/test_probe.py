"""`omforge probe`: the table, the list, the kit, and a result that is brought back."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import onnx
import pytest

from omforge.air.files import read_air
from omforge.bundle.manifest import Manifest
from omforge.cli.facts import options_of_device
from omforge.ir.errors import InputError
from omforge.runtime.bundle import Bundle
from tests.cli.test_app import Result
from tests.probe.conftest import PLANTED_ATC
from tests.runtime.conftest import tiny_bundle as tiny_bundle
from tests.runtime.tiny import Tiny

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


def test_probe_without_a_target_says_what_goes_without_one() -> None:
    done = Result("probe", "--atc", "sim")
    assert done.status == 2
    assert "Give --target SOC, or one of --read, --bench and --list" in done.err
    assert "Ascend310P3" in Result("probe", "--target", "310", "--atc", "sim").err


# --facts

TWO_IMPORTS = """<ir_version: 8, opset_import: ["" : 16, "npu" : 1]>
g (float16[4, 64] x) => (float16[4, 64] y) { h = npu.NPUFastGelu (x) y = Add (h, x) }"""


def facts(folder: Path, name: str, **values: str) -> Path:
    """A facts file of 310P3."""
    answers = {
        probe.replace("_", "-"): {"value": value, "number": None, "evidence": "planted"}
        for probe, value in values.items()
    }
    document = {"schema": 1, "soc": SOC, "cann": "8.5", "simulated": False, "answers": answers}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(document))
    return folder / name


@pytest.fixture
def model(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(TWO_IMPORTS)
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_check_follows_the_facts_that_it_is_given(model: Path, tmp_path: Path) -> None:
    assert Result("check", model, "--target", SOC).status == 1
    file = facts(tmp_path, "facts.json", two_opset_imports="taken")
    done = Result("check", model, "--target", SOC, "--facts", file)
    assert done.status == 0, done.out
    assert done.err == ""
    assert "seen on Ascend310P3 with CANN 8.5: two-opset-imports is taken" in done.out


def test_check_finds_facts_in_the_users_folder_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "omforge"
    file = facts(folder, f"facts-8.5-{SOC}.json", two_opset_imports="taken")
    done = Result("check", model, "--target", SOC)
    assert done.status == 0
    assert done.err == (
        f"facts: {file}: 1 facts of {SOC} and CANN 8.5 (--facts none leaves them aside)\n"
    )
    assert Result("check", model, "--target", SOC, "--facts", "none").status == 1
    facts(folder, f"facts-8.1-{SOC}.json", two_opset_imports="taken")
    several = Result("check", model, "--target", SOC)
    assert several.status == 1
    assert "none is taken, name one by --facts" in several.err


def test_facts_that_are_none_end_the_command(model: Path, tmp_path: Path) -> None:
    done = Result("check", model, "--target", SOC, "--facts", tmp_path / "absent.json")
    assert done.status == 2
    assert "cannot read" in done.err
    done = Result("check", model, "--target", "Ascend910B4", "--facts", facts(tmp_path, "f.json"))
    assert done.status == 2
    assert "is of another family" in done.err


def test_a_bundle_says_by_which_facts_it_was_compiled(
    exported: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = exported("optimum", "llama_gqa")
    sizes = ("--target", SOC, "--context", "16", "--prefill", "4", "--atc", "none")
    file = facts(tmp_path, "facts.json", incre_attention_grouped="wrong")
    done = Result("compile", source, *sizes, "--facts", file, "-o", tmp_path / "bundle")
    assert done.status == 0, done.err
    manifest = Manifest.load(tmp_path / "bundle")
    assert manifest.facts == hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest.front == "onnx"
    shown = facts(
        tmp_path,
        "shown.json",
        air_taken="taken",
        cache_in_place="in-place",
        two_models_one_cache="right",
        incre_attention_grouped="right",
    )
    done = Result("compile", source, *sizes, "--facts", shown, "-o", tmp_path / "air")
    assert done.status == 0, done.err
    assert Manifest.load(tmp_path / "air").front == "air"
    ops = {op.type for op in read_air(tmp_path / "air" / "decode_c16.air").graph.ops}
    assert "IncreFlashAttention" in ops  # grouped heads: only because it was seen


def test_run_uses_the_device_as_the_facts_say(tmp_path: Path) -> None:
    manifest = cast("Manifest", SimpleNamespace(target=SOC))
    file = facts(tmp_path, "facts.json", copy_2d_within_device="fails")
    options = options_of_device(file, manifest, "sim")
    assert options is not None
    assert options.kv_copy == "rows"
    assert options_of_device(file, manifest, "cpu") is None
    with pytest.raises(InputError):
        options_of_device(tmp_path / "absent", manifest, "acl")
    elsewhere = cast("Manifest", SimpleNamespace(target="Mine1"))
    assert options_of_device(None, elsewhere, "acl") is None


def test_bench_measures_a_bundle(tiny_bundle: Callable[[Tiny], Bundle]) -> None:
    folder = tiny_bundle(Tiny(om=True)).folder
    done = Result("probe", "--bench", folder, "--backend", "sim", "--steps", "2")
    assert done.status == 0, done.err
    assert done.out.startswith("first token")
    assert "tokens a second" in done.out
    assert done.out.endswith("measured on the simulator: this says nothing of a device\n")
    assert Result("probe", "--bench", folder, "--backend", "none").status == 2
