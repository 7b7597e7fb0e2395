"""The runner that a kit takes along: every answer planted, crashes, interruptions, and its age."""

import argparse
import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omforge.lowering.target import TARGETS
from omforge.probe import portable
from omforge.probe.questions import PROBES, probes_for
from omforge.probe.record import Probe
from omforge.runtime.acl_sim import simulated_acl

SOCS = ("Ascend310P3", "Ascend910B4", "Ascend310B4", "Ascend910_95")


class PlantedDevice:
    """A device whose buffers hold what a test says; a run fails where it says nothing."""

    held: dict[str, np.ndarray] | None = None

    def __init__(self, number: int) -> None:
        self.acl = argparse.Namespace()
        self.buffers = {name: (0, 0) for name in ("from", "to")}

    def load(self, *_: Any) -> None:
        if self.held is None:
            raise portable.Failed("planted")

    def write(self, *_: Any) -> None:
        self.load()

    ratio = 1.0

    def run(self, step: dict[str, Any], *_: Any) -> float:
        return 1e-3 * (self.ratio if step["model"] == "int64" else 1)

    in_stream = begin = end = write

    def call(self, *_: Any) -> list[int]:
        self.load()
        return [7, 0]

    def read(self, name: str, size: int) -> bytes:
        assert self.held is not None
        return self.held[name].tobytes() if self.held else b"\x5a" * size


def options(kit: Path, work: Path, atc: Path, **given: Any) -> argparse.Namespace:
    soc = json.loads((kit / "kit.json").read_text())["soc"]
    words = ["--target", soc, "--atc", str(atc), "--work", str(work), "-o", str(work / "result")]
    found = portable.arguments(words)
    vars(found).update(given)
    work.mkdir(exist_ok=True)
    return found


class PlantedAtc:
    """In this process, what `conftest` has as a program: 100 probes start it hundreds of times."""

    code, files = "", 1

    def __call__(self, words: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        if self.code:
            return subprocess.CompletedProcess(words, 255, f"{self.code}: Planted.".encode())
        output = Path(next(word for word in words if word.startswith("--output="))[9:])
        (output.parent / "weight").mkdir(exist_ok=True)
        for number in range(self.files):
            (output.parent / "weight" / f"weight_{number}").touch()
        output.with_name(f"{output.name}.om").write_text("om")
        return subprocess.CompletedProcess(words, 0, portable.SUCCESS.encode())


def questions(kits: dict[str, Path]) -> Iterator[tuple[Path, Probe, str, dict[str, Any]]]:
    """Every question once: the kit, the probe, the family and what the kit holds of it."""
    seen: set[str] = set()
    for soc in SOCS:
        family = TARGETS[soc].family.name
        by_name = {each["id"]: each for each in portable.read_kit(str(kits[soc]))["probes"]}
        for probe in probes_for(family):
            if probe.id not in seen:
                seen.add(probe.id)
                yield kits[soc], probe, family, by_name[probe.id]
    assert seen == set(PROBES)


def test_every_value_of_every_question_is_answered_when_it_is_planted(
    kits: dict[str, Path], atc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portable, "Device", PlantedDevice)
    planted = PlantedAtc()
    monkeypatch.setattr(portable.subprocess, "run", planted)
    asked = 0
    for kit, probe, family, held in questions(kits):
        experiment, chosen = probe.make(family), options(kit, tmp_path, atc)
        for value in probe.values(experiment):
            planted.code, planted.files, PlantedDevice.held = "", 1, {}
            PlantedDevice.ratio = 2.0 if value == experiment.over[0] else 1.0
            if value in experiment.judged:
                PlantedDevice.held = dict(experiment.judged[value])
            elif value in experiment.counts.values():
                planted.files = next(n for n, v in experiment.counts.items() if v == value)
            elif value in probe.codes.values():
                planted.code = next(c for c, v in probe.codes.items() if v == value)
            elif value == probe.refused and experiment.builds:
                planted.code = "E19999"
            elif value == probe.failed:
                PlantedDevice.held = None
            if value == probe.refused and not experiment.builds:
                continue
            found = portable.ask(str(kit), held, chosen, lambda _: None)
            assert found["value"] == value, (probe.id, value, found)
            assert found["evidence"]
            asked += 1
    assert asked > 350


def test_the_runner_is_of_python_3_8_and_needs_numpy_alone() -> None:
    source = Path(portable.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    assert isinstance(tree.body[1], ast.ImportFrom)
    assert tree.body[1].module == "__future__"  # annotations are not evaluated
    modules = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert modules - set(sys.stdlib_module_names) - {"concurrent.futures"} == {"numpy"}
    # What later Pythons brought, and a parser does not see.
    newer = {"removeprefix", "removesuffix", "pairwise", "batched", "cache", "bit_count", "UTC"}
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & newer
    keywords = {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
    assert not keywords & {"strict", "cancel_futures", "root_dir"}
    annotations = {id(part) for n in ast.walk(tree) for part in _annotations(n)}
    types = {"str", "int", "float", "bool", "None", "Any", "Json"}
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = {ast.unparse(node.left), ast.unparse(node.right)}
            assert id(node) in annotations or not sides & types, ast.unparse(node)


def _annotations(node: ast.AST) -> list[ast.AST]:
    found = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    return [part for each in found if each is not None for part in ast.walk(each)]


@pytest.mark.parametrize(
    ("plant", "evidence"),
    [("hang", "no answer within 2 seconds"), ("kill", "it ended with -9 (build)")],
)
def test_a_probe_that_hangs_or_dies_answers_nothing_and_ends_no_other(
    plant: str,
    evidence: str,
    kits: dict[str, Path],
    atc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLANT", plant)
    kit = kits["Ascend310P3"]
    timeout = 2 if plant == "hang" else 20
    chosen = options(kit, tmp_path, atc, only=["never-made"], backend="none", timeout=timeout)
    told: list[str] = []
    found = portable.answer_kit(str(kit), chosen, lambda name, *_: told.append(name))
    assert sorted(told) == ["never-made", "onnx-taken"]
    for answer in found["answers"].values():
        assert answer["value"] is None
        assert answer["evidence"].startswith(evidence)


def test_a_crash_on_the_device_is_an_answer(
    kits: dict[str, Path], atc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "acl.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    kit = kits["Ascend310P3"]
    chosen = options(kit, tmp_path / "work", atc, only=["runs"])
    found = portable.answer_kit(str(kit), chosen, lambda *_: None)["answers"]
    assert found["onnx-taken"]["value"] == "taken"
    assert (found["runs"]["value"], found["runs"]["evidence"]) == (
        "fails",
        "it ended with -11 (run)",
    )


def test_an_answer_counts_only_where_its_controls_gave_theirs(
    kits: dict[str, Path], atc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANT", "E19999")  # an atc without the SoC's operators refuses everything
    kit = kits["Ascend310P3"]
    chosen = options(kit, tmp_path, atc, only=["never-made", "air-taken"], backend="none")
    found = portable.answer_kit(str(kit), chosen, lambda *_: None)["answers"]
    assert found["onnx-taken"]["value"] == "refused"
    for name in ("never-made", "air-taken"):
        assert found[name]["value"] is None
        assert "says nothing while onnx-taken is 'refused'" in found[name]["evidence"]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_with_what_has_no_answer(
    kits: dict[str, Path], atc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = kits["Ascend310P3"]
    chosen = options(kit, tmp_path, atc, only=["never-made"], backend="none", jobs=1)
    with pytest.raises(KeyboardInterrupt):
        portable.answer_kit(str(kit), chosen, interrupt)
    kept = json.loads((tmp_path / "result").read_text())
    assert kept["complete"] is False
    assert list(kept["answers"]) == ["onnx-taken"]
    told: list[str] = []
    found = portable.answer_kit(str(kit), chosen, lambda name, *_: told.append(name))
    assert told == ["never-made"]
    assert found["complete"] is True
    assert set(found["answers"]) == {"onnx-taken", "never-made"}
    told.clear()
    portable.answer_kit(str(kit), chosen, lambda name, *_: told.append(name))
    assert sorted(told) == ["never-made", "onnx-taken"]  # what is complete is asked anew
    monkeypatch.setenv("PLANT", "EZ3003")
    with pytest.raises(KeyboardInterrupt):
        portable.answer_kit(str(kit), chosen, interrupt)
    monkeypatch.setenv("PLANT", "taken")  # it was mended: nothing of before counts
    told.clear()
    portable.answer_kit(str(kit), chosen, lambda name, *_: told.append(name))
    assert sorted(told) == ["never-made", "onnx-taken"]
    told.clear()
    portable.answer_kit(
        str(kit),
        options(kit, tmp_path, atc, again=True, only=["onnx-taken"], backend="none"),
        lambda name, *_: told.append(name),
    )
    assert told == ["onnx-taken"]


def test_ctrl_c_ends_what_runs(
    kits: dict[str, Path], atc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANT", "hang-never-made")
    kit = kits["Ascend310P3"]
    chosen = options(kit, tmp_path, atc, only=["never-made"], backend="none", jobs=2)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        portable.answer_kit(str(kit), chosen, interrupt)
    assert time.monotonic() - started < 30  # and not the minute that the other one takes
    assert not portable.CHILDREN


def test_infinities_and_nan_are_compared_by_place() -> None:
    wanted = np.array([1, np.inf, np.nan], np.float16)
    assert portable.difference(wanted, wanted, 0, 1e-3) == 0
    assert portable.difference(np.array([1, 65504, np.nan], np.float16), wanted, 0, 1) == np.inf
    assert portable.difference(np.array([np.nan, np.inf, 1], np.float16), wanted, 0, 1) == np.inf


# On the simulators, in this process: the models are right, and so are the numbers beside them.
ON_THE_SIMULATOR = {
    "made-twice": "refused",
    "layer-norm-without-bias": "right",
    "weights-by-pyacl": "right",
    "weight-files": "one",
    "copy-2d-within-device": "right",
    "matmul-accumulation": "float32",
    "softmax-accumulation": "float32",
    "float16-overflow": "infinite",
    "rotary-mul-beyond-its-document": "right",
    "rotary-position-embedding": "right",
    "scaled-masked-softmax": "right",
    "zero-element-pse": "right",
    "weight-quant-groups": "right",
    "int4-packing": "right",
    "int4-initializer": "right",
    "dequant-per-output": "right",
    "dequant-alone": "right",
    "one-workspace": "right",
    "init-after-finalize": "right",
    "launch": "measured",
    "workspace": "measured",
    # GE graphs
    "air-taken": "taken",
    "cache-in-place": "in-place",
    "cache-in-place-int8": "in-place",
    "cache-in-place-by-index": "in-place",
    "data-in-place": "refused",
    "view-in-place": "refused",
    "two-models-one-cache": "right",
    "quant-update-scatter": "by-scale",
    "incre-attention": "right",
    "incre-attention-grouped": "right",
    "incre-attention-int8": "right",
    "incre-attention-lengths": None,  # no twin on the CPU
    "prompt-attention-16": "right",
    "fused-infer-attention": "right",
    "fused-infer-attention-int8": "right",
    "air-weight-groups": "right",
    "one-weights-file": "right",
    "air-input-shape": "right",
    "bfloat16": "right",
    "rms-norm-epsilon": "right",
    "air-add-rms-norm": "right",
    "air-swish": "right",
    "air-gelu": "right",
    "air-rotary-mul": "right",
    "swiglu": "right",
    "grouped-matmul": None,
    "descriptions-disagree": "right",
    "net-output-names": "right",
}


def test_the_models_do_what_is_written_beside_them(
    kits: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omforge.atc.sim.main import run as atc_sim

    def simulated(words: list[str], cwd: str, **_: Any) -> subprocess.CompletedProcess[bytes]:
        with monkeypatch.context() as there:
            there.chdir(cwd)  # from where a GE graph names its weights
            done = atc_sim(words[1:])
        return subprocess.CompletedProcess(words, done.exit_status, done.text.encode())

    monkeypatch.setattr(portable.subprocess, "run", simulated)
    monkeypatch.setitem(sys.modules, "acl", simulated_acl(external_weights=True))
    kit = kits["Ascend910B4"]
    chosen = options(kit, tmp_path, Path("atc"))
    for probe in portable.read_kit(str(kit))["probes"]:
        operator = probe["id"].startswith("operator-")
        if operator or probe["id"] in ON_THE_SIMULATOR:
            found = portable.ask(str(kit), probe, chosen, lambda _: None)
            wanted = "right" if operator else ON_THE_SIMULATOR[probe["id"]]
            assert found["value"] == wanted, (probe["id"], found)
            assert found["simulated"] or wanted in ("refused", None)
