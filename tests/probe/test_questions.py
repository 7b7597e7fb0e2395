"""Every inferred row of every table names a probe, every probe settles something, and is as it says."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from omforge.air.files import read_air
from omforge.air.graph import Air
from omforge.air.reference import reference
from omforge.lowering.air_legality import AIR_RULES, check_air
from omforge.lowering.facts import claims, row_key
from omforge.lowering.legality import ALL_RULES
from omforge.lowering.legality.kernel_rules import kernels_key
from omforge.lowering.legalize.choices import CHOICES
from omforge.lowering.llm_ops import llm_ops
from omforge.lowering.tables import table_rows
from omforge.lowering.target import TARGETS
from omforge.probe import portable
from omforge.probe.questions import PROBES, probes_for
from omforge.probe.record import Step
from omforge.probe.settled import settled

SOCS = ("Ascend310P3", "Ascend910B4", "Ascend310B4", "Ascend910_95")


def inferred() -> set[tuple[str, str]]:
    """Every row that hardware alone can settle, by table and key."""
    rules = (*ALL_RULES.values(), *AIR_RULES)
    rows = {("rule", rule.id) for rule in rules if rule.certainty == "inferred"}
    rows |= {("form", f"{c.op}={c.form}") for c in CHOICES if c.certainty == "uncertain"}
    for table, file, name, what in (
        ("operator", "llm_ops.tsv", "op", ("kind", "name", "value")),
        ("release", "cann_releases.tsv", "release", ("note",)),
        ("plugin", "onnx_plugins.tsv", "op", ("kind", "attribute")),
    ):
        rows |= {
            (table, row_key(row[name], " ".join(row[each] for each in what)))
            for row in table_rows(file)
            if row["certainty"] == "inferred"
        }
    return rows


def test_every_inferred_row_names_a_probe() -> None:
    assert inferred() - set(claims()) == set(), "add a line to claims.tsv, and a probe"


def test_what_a_target_calls_untested_names_a_probe() -> None:
    for target in TARGETS.values():
        for fact in target.family.facts:
            if "untested" in fact.text or "its prototype excludes" in fact.text:
                key = row_key(target.family.name, fact.text)
                inherited = row_key("910b", fact.text)
                assert ("target", key) in claims() or ("target", inherited) in claims()


def test_every_claim_is_of_a_row_and_of_values_that_a_probe_may_give() -> None:
    others = {("form", f"{choice.op}={choice.form}") for choice in CHOICES}
    families = {target.family.name: target.family for target in TARGETS.values()}.values()
    others |= {("target", row_key(f.name, fact.text)) for f in families for fact in f.facts}
    others |= {("operator", kernels_key(op)) for op in llm_ops().values()}
    assert set(claims()) - inferred() - others == set()
    assert len(claims()) == len(list(table_rows("claims.tsv")))
    for row, claim in claims().items():
        name, _, values = claim.partition("=")
        probe = PROBES[name]
        possible = set().union(*(probe.values(probe.make(f)) for f in probe.families))
        assert set(values.split("|")) <= possible, row


def test_every_probe_settles_something() -> None:
    assert [probe.id for probe in PROBES.values() if not settled(probe)] == []


@pytest.mark.parametrize("soc", SOCS)
def test_every_value_has_a_meaning(soc: str) -> None:
    family = TARGETS[soc].family.name
    for probe in probes_for(family):
        experiment = probe.make(family)
        values = probe.values(experiment)
        assert values <= set(probe.means), probe.id
        assert probe.expected in ("", *values), probe.id
        assert len(experiment.judged) == len({str(v) for v in experiment.judged})
        for control in probe.after:
            assert control.partition("=")[2] in PROBES[control.partition("=")[0]].means


def test_controls_come_first_and_stand_on_no_circle() -> None:
    seen: set[str] = set()
    for probe in PROBES.values():
        assert {control.partition("=")[0] for control in probe.after} <= seen, probe.id
        seen.add(probe.id)


@pytest.mark.parametrize("soc", SOCS)
def test_the_numbers_of_two_values_differ_by_more_than_the_tolerance(soc: str) -> None:
    family = TARGETS[soc].family.name
    for probe in probes_for(family):
        experiment = probe.make(family)
        values = list(experiment.judged.items())
        for at, (value, wanted) in enumerate(values):
            for other, held in values[:at]:
                far = max(
                    portable.difference(
                        np.asarray(held[name]),
                        np.asarray(wanted[name]),
                        experiment.rtol,
                        experiment.atol,
                    )
                    for name in wanted
                    if name in held
                )
                assert far > 1, f"{probe.id}: {value} cannot be told from {other}"


# A GE graph may break the law where the law is the question.
BROKEN = {
    "data-in-place": "air-ref-data",
    "view-in-place": "air-ref-view",
    "expert-gating": "air-kernel air-op-release",
    "air-rotary-mul": "air-rotary-mul",
    "air-weight-groups": "air-weight-quant-product",
    "newer-operator": "air-kernel air-op-release",
    "grouped-matmul": "air-formats",
    "air-outside-prototypes": "air-prototype-dtypes",
    "air-without-inputs": "air-has-inputs",
    "constant-description-disagrees": "air-const-desc",
    "descriptions-disagree": "air-desc-agrees",
    "net-output-names": "air-net-output",
    "beyond-the-nearest-kernels": "air-kernel-inferred",
    "beyond-the-nearest-dtypes": "air-dtypes-inferred",
    "one-weights-file": "air-weight-files",  # its path is from the kit's folder, where atc runs
}


@pytest.mark.parametrize("soc", SOCS)
def test_ge_graphs_are_legal_but_for_what_they_ask(soc: str, kits: dict[str, Path]) -> None:
    files = sorted((kits[soc] / "models").rglob("*.air"))
    assert len(files) > 10
    for file in files:
        offences = check_air(read_air(file), TARGETS[soc], path=file)
        found = {offence.code for offence in offences if offence.level == "error"}
        allowed = set(BROKEN.get(file.parent.name, "").split())
        assert found <= allowed, (file.parent.name, [str(each) for each in offences])


def test_a_kit_is_the_same_twice_and_small(kits: dict[str, Path], tmp_path: Path) -> None:
    from omforge.probe.kit import write_kit

    write_kit(tmp_path / "again", TARGETS["Ascend310P3"])
    first = {
        f.relative_to(kits["Ascend310P3"]): f.read_bytes()
        for f in kits["Ascend310P3"].rglob("*")
        if f.is_file()
    }
    again = {
        f.relative_to(tmp_path / "again"): f.read_bytes()
        for f in (tmp_path / "again").rglob("*")
        if f.is_file()
    }
    assert first == again
    assert sum(map(len, first.values())) < 5 << 20
    kit = json.loads((kits["Ascend310P3"] / "kit.json").read_text())
    assert [each["id"] for each in kit["probes"]] == [each.id for each in probes_for("310p")]


# What the reference of GE graphs does not run, or has another reading of, which the probe settles.
WITHOUT_REFERENCE = {
    "incre-attention-lengths": "actual_seq_lengths",
    "incre-attention-lengths-sunk": "actual_seq_lengths",
    "fused-infer-attention-lengths": "actual_seq_lengths_kv",
    "expert-gating": "MoeGatingTopKSoftmax",
    "grouped-matmul": "GroupedMatmul",
    "apply-rotary": "Muls",
    "bfloat16": "no sum of bfloat16 in ONNX Runtime",
    "one-weights-file": "its file is in the kit",
    "constant-description-disagrees": "the graph is wrong on purpose",
}
BY_REFERENCE = {
    "data-in-place": "lost",
    "view-in-place": "lost",
    "quant-update-scatter": "by-scale",
}


@pytest.mark.parametrize("soc", ["Ascend910B4", "Ascend310B4"])
def test_the_numbers_beside_a_ge_graph_are_those_of_its_reference(soc: str) -> None:
    """Two derivations of what an operator computes: the probe's in numpy, the reference's in ONNX."""
    family = TARGETS[soc].family.name
    checked = 0
    for probe in probes_for(family):
        experiment = probe.make(family)
        models = {b.name: b.model for b in experiment.builds if isinstance(b.model, Air)}
        if not (models and experiment.judged) or probe.id in WITHOUT_REFERENCE:
            continue
        held = on_the_reference(models, experiment.steps)
        value = BY_REFERENCE.get(probe.id, next(iter(experiment.judged)))
        for name, wanted in experiment.judged[value].items():
            found = held[name].reshape(np.shape(wanted))
            far = portable.difference(found, wanted, experiment.rtol, experiment.atol)
            assert far <= 1, (probe.id, name, far)
        checked += 1
    assert checked > 8


def on_the_reference(models: dict[str, Air], steps: tuple[Step, ...]) -> dict[str, np.ndarray]:
    """What the buffers hold at the end."""
    held: dict[str, np.ndarray] = {}
    for step in steps:
        given = step.given
        if step.do == "fill":
            held[given["buffer"]] = given["array"]
        if step.do != "run":
            continue
        twin = reference(models[given["model"]])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(twin.model.SerializeToString(), options)
        buffers = dict(zip((i.name for i in session.get_inputs()), given["inputs"], strict=True))
        outputs = [output.name for output in session.get_outputs()]
        made = session.run(None, {name: held[buffer] for name, buffer in buffers.items()})
        results = dict(zip(outputs, made, strict=True))
        plain = [name for name in outputs if name not in twin.written.values()]
        held |= {b: results[name] for name, b in zip(plain, given["outputs"], strict=True)}
        held |= {buffers[name]: results[after] for name, after in twin.written.items()}
    return held


@pytest.mark.parametrize("name", ["grid-sample-without-mode", "grid-sample-without-padding"])
def test_what_the_simulator_refuses_is_right_on_onnx_runtime(name: str) -> None:
    """Bernoulli is not among them: ONNX Runtime has its 0 and 1 the other way round."""
    experiment = PROBES[name].make("310p")
    (build,) = experiment.builds
    assert isinstance(build.model, onnx.ModelProto)
    feeds = {s.given["buffer"]: s.given["array"] for s in experiment.steps if s.do == "fill"}
    session = onnxruntime.InferenceSession(build.model.SerializeToString())
    (found,) = session.run(None, feeds)
    np.testing.assert_allclose(found, experiment.judged["right"]["y"])
