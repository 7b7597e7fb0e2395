"""Facts: read, refused when they are none, and what is claimed of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from omforge import ir
from omforge.ir.errors import InputError
from omforge.lowering.air_legality import check_air_file
from omforge.lowering.facts import NOTHING_SEEN, Facts, Seen
from omforge.lowering.facts_file import find_facts, read_facts
from omforge.lowering.legality import Offence, check_file
from omforge.lowering.legalize import Decision, legalize
from omforge.lowering.target import TARGETS, Target
from omforge.probe.kit import write_kit

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


# What follows: forms.

ROTARY = """<ir_version: 10, opset_import: ["" : 24]>
rotate (float16[2,4,8,64] x, float16[2,8,32] cos, float16[2,8,32] sin) => (float16[2,4,8,64] y)
{ y = RotaryEmbedding (x, cos, sin) }"""
FORM = "NPURotaryPositionEmbedding"


def seeing(soc: str, **values: str) -> Target:
    """A target on which probes have answered."""
    seen = {name.replace("_", "-"): Seen(value, "planted") for name, value in values.items()}
    return dataclasses.replace(TARGETS[soc], facts=Facts(soc, "8.1.RC1", seen))


def rotary_decision(target: Target, forms: dict[str, str] | None = None) -> Decision:
    """What becomes of a rotary embedding that NPURotaryMul does not take: heads of 64, two rows."""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(ROTARY))
    told: list[Decision] = []
    legalize(ir.from_proto(proto), target, forms=forms, told=told)
    return told[0]


def refusals(decision: Decision) -> dict[str, str]:
    """Why the other forms were not chosen."""
    return {refusal.form: refusal.reason for refusal in decision.refused}


def test_an_uncertain_form_is_in_the_running_once_its_probe_said_yes() -> None:
    unseen = rotary_decision(TARGETS["Ascend910B4"])
    assert unseen.form == "decomposed"
    assert refusals(unseen)[FORM].startswith("not asked for: ")
    seen = rotary_decision(seeing("Ascend910B4", rotary_position_embedding="right"))
    assert seen.form == FORM  # by its bytes, not because it was asked for
    assert refusals(seen)["decomposed"] == "it moves more bytes"
    assert seen.reason.endswith("rotary-position-embedding is right (planted)")


@pytest.mark.parametrize("value", ["wrong", "refused", "no-plugin", "fails"])
def test_a_form_is_refused_once_its_probe_said_no_even_where_it_is_asked_for(value: str) -> None:
    target = seeing("Ascend910B4", rotary_position_embedding=value)
    decision = rotary_decision(target, {"RotaryEmbedding": FORM})
    assert decision.form == "decomposed"
    assert refusals(decision)[FORM] == (
        f"seen on Ascend910B4 with CANN 8.1.RC1: rotary-position-embedding is {value} (planted)"
    )


# What follows: rules.

TWO_IMPORTS = """<ir_version: 8, opset_import: ["" : 16, "npu" : 1]>
g (float16[4, 64] x) => (float16[4, 64] y) { h = npu.NPUFastGelu (x) y = Add (h, x) }"""


@pytest.fixture
def two_imports(tmp_path: Path) -> Path:
    proto = onnx.parser.parse_model(TWO_IMPORTS)
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def offence(path: Path, target: Target, allow: tuple[str, ...] = ()) -> Offence:
    """The offence against one-opset-import."""
    found = check_file(path, target, allow=allow).offences
    return next(each for each in found if each.code == "one-opset-import")


def test_a_rule_that_was_seen_not_to_hold_is_advice(two_imports: Path) -> None:
    unseen = offence(two_imports, SOC)
    assert (unseen.level, unseen.certainty) == ("error", "inferred")
    relaxed = offence(two_imports, seeing("Ascend310P3", two_opset_imports="taken"))
    assert (relaxed.level, relaxed.certainty) == ("advice", "seen")
    assert "seen on Ascend310P3 with CANN 8.1.RC1: two-opset-imports is taken" in relaxed.why


def test_a_rule_that_was_seen_to_hold_cannot_be_allowed_away(two_imports: Path) -> None:
    target = seeing("Ascend310P3", two_opset_imports="refused")
    strict = offence(two_imports, target)
    assert (strict.level, strict.certainty) == ("error", "seen")
    assert offence(two_imports, SOC, ("one-opset-import",)).level == "advice"
    with pytest.raises(InputError, match="two-opset-imports is refused"):
        check_file(two_imports, target, allow=("one-opset-import",))


SCATTER = """<ir_version: 8, opset_import: ["" : 16]>
g (float16[4, 64] x, int32[1, 64] i, float16[1, 64] u) => (float16[4, 64] y)
{ y = ScatterElements <axis = 0> (x, i, u) }"""
DYNAMIC_QUANT = """<ir_version: 8, opset_import: ["" : 16]>
g (float16[4, 64] x) => (int8[4, 64] y, float[4] s) { y, s = NPUDynamicQuant (x) }"""


def kernel_faults(folder: Path, text: str, target: Target) -> list[str]:
    """What the rule `kernel` says."""
    proto = onnx.parser.parse_model(text)
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    onnx.save(proto, folder / "model.onnx")
    return [o.why for o in check_file(folder / "model.onnx", target).errors if o.code == "kernel"]


def test_an_operator_that_was_seen_to_fail_has_no_kernel(tmp_path: Path) -> None:
    assert kernel_faults(tmp_path, SCATTER, SOC) == []
    for value in ("refused", "wrong", "fails"):
        target = seeing("Ascend310P3", operator_scatterelements=value)
        (why,) = kernel_faults(tmp_path, SCATTER, target)
        assert f"operator-scatterelements is {value} (planted)" in why
    assert not kernel_faults(
        tmp_path, SCATTER, seeing("Ascend310P3", operator_scatterelements="right")
    )


def test_a_kernel_that_no_table_has_is_there_once_it_was_seen(tmp_path: Path) -> None:
    assert kernel_faults(tmp_path, DYNAMIC_QUANT, SOC)
    assert not kernel_faults(tmp_path, DYNAMIC_QUANT, seeing("Ascend310P3", dynamic_quant="right"))


BERNOULLI = """<ir_version: 8, opset_import: ["" : 15]>
g (float[4, 64] x) => (float[4, 64] y) { y = Bernoulli (x) }"""


def test_what_a_plugin_was_seen_to_do_right_is_advice(tmp_path: Path) -> None:
    def level(target: Target) -> str:
        proto = onnx.parser.parse_model(BERNOULLI)
        proto.graph.node[0].name = "n"
        onnx.save(proto, tmp_path / "model.onnx")
        found = check_file(tmp_path / "model.onnx", target).offences
        return next(each.level for each in found if each.code == "plugin-changes")

    assert level(SOC) == "error"
    assert level(seeing("Ascend310P3", bernoulli_without_dtype="right")) == "advice"
    assert level(seeing("Ascend310P3", bernoulli_without_dtype="wrong")) == "error"


def test_facts_of_a_ge_graph_are_followed_too(tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    write_kit(kit, SOC)
    file = kit / "models" / "view-in-place" / "model.air"

    def found(target: Target) -> tuple[str, str]:
        each = next(o for o in check_air_file(file, target).offences if o.code == "air-ref-view")
        return each.level, each.certainty

    assert found(SOC) == ("error", "inferred")
    assert found(seeing("Ascend310P3", view_in_place="in-place")) == ("advice", "seen")
    assert found(seeing("Ascend310P3", view_in_place="lost")) == ("error", "seen")
