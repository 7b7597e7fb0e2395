"""A plan: what fits, which choice makes it fit, and what lengths are best."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omforge import ir
from omforge.bundle.manifest import TensorSpec
from omforge.compilation.footprint import spec_bytes
from omforge.compilation.options import CompileOptions
from omforge.planning.lengths import Lengths
from omforge.planning.memory import memory_map
from omforge.planning.plan import Plan, make_plan, require_fit
from omforge.planning.report import lines
from omforge.planning.subject import open_subject
from omforge.testing import parse
from tests.passes.recurrent import model as recurrent

Exported = Callable[[str, str], Path]
SIZES: dict[str, Any] = {"context": 256, "prefill": (64,)}


@pytest.fixture(scope="module")
def source(exported: Exported) -> Path:
    return exported("optimum", "llama_gqa")


def planned(path: Path, soc: str = "Ascend910B4", **asked: Any) -> Plan:
    options = {
        key: asked.pop(key)
        for key in list(asked)
        if key in CompileOptions.__dataclass_fields__ and key != "memory"
    }
    return make_plan(path, CompileOptions(soc, **{**SIZES, **options}), **asked)


def text(plan: Plan) -> str:
    return "\n".join(lines(plan))


def test_every_choice_saves_what_it_says(source: Path) -> None:
    plan = planned(source)
    assert {knob.flags for knob in plan.knobs} == {
        *("--quantize int8", "--quantize int4", "--kv-dtype int8", "--front air"),
        *("--prefill 32", "--context 128", "--gears"),
    }
    subject = open_subject(source, plan.options)
    for knob in plan.knobs:
        if knob.total is not None:
            again = memory_map(subject.lower(knob.options), subject.fixed)
            assert again.total == knob.total == plan.memory.total - knob.saved
    saved = {knob.flags: knob.saved for knob in plan.knobs}
    assert saved["--quantize int4"] > saved["--quantize int8"] > 0
    assert saved["--context 128"] >= plan.memory.cache_bytes // 2


def test_what_a_target_cannot_do_says_why(source: Path) -> None:
    plan = planned(source, "Ascend310P3")
    (int4,) = (knob for knob in plan.knobs if knob.flags == "--quantize int4")
    assert int4.total is None
    assert "310P has NPUWeightQuantBatchMatmulV2 for int8 weights" in int4.why
    assert "not possible: 310P has" in text(plan)


def test_it_fits_or_says_what_makes_it_fit(source: Path) -> None:
    whole = planned(source, knobs=False).memory.total
    assert planned(source, memory=whole, knobs=False).fits
    plan = planned(source, memory=whole - 1)
    assert plan.fits is False
    assert f"does not fit in {whole - 1:,} bytes (--memory): 1 bytes too many" in text(plan)
    assert "It fits with --quantize int8" in text(plan)
    with pytest.raises(ir.CheckError, match=r"weights [\d,]+ \+ .* = .*, 1 too many.*It fits with"):
        require_fit(plan)


def test_several_choices_together_are_counted_before_they_are_told(source: Path) -> None:
    whole = planned(source)
    least = min(knob.total for knob in whole.knobs if knob.total is not None)
    plan = planned(source, memory=least - 1000)
    assert plan.together is not None
    subject = open_subject(source, plan.options)
    total = memory_map(subject.lower(plan.together.options), subject.fixed).total
    assert total == plan.together.total
    assert total <= least - 1000
    assert f"It fits with {plan.together.flags}" in text(plan)


def test_what_nothing_makes_fit_says_so(source: Path) -> None:
    plan = planned(source, memory=1000)
    assert plan.together is None
    assert "no choice below makes it fit, nor several together" in text(plan)
    with pytest.raises(ir.CheckError, match="No choice makes it fit"):
        require_fit(plan)


def test_a_target_has_its_own_memory_and_times(source: Path) -> None:
    plan = planned(source, knobs=False)
    assert (plan.limit, plan.limited_by) == (32 << 30, "the memory of Ascend910B4")
    decode = plan.steps[-1]
    assert plan.tokens_a_second == pytest.approx(1 / (decode.bound or 0))
    assert plan.first_token == plan.steps[0].bound
    assert "tokens a second: at most" in text(plan)
    assert "the weights may stay in the chip's L2" in text(plan)


def test_what_is_not_known_of_a_target_is_in_no_figure(source: Path) -> None:
    plan = planned(source, "Ascend310B1", knobs=False)
    assert (plan.limit, plan.fits, plan.first_token, plan.tokens_a_second) == (None,) * 4
    assert "nobody says how much memory the target has: give --memory" in text(plan)
    assert "not known of Ascend310B1: memory bandwidth, peak of products" in text(plan)
    with pytest.raises(ir.CheckError, match=r"lengths cannot be weighed for .*omforge probe"):
        planned(source, "Ascend310B1", lengths=Lengths({100: 1}), knobs=False)


def test_a_batch_has_the_cache_and_the_tokens_of_all_rows(source: Path) -> None:
    one, four = (planned(source, batch=rows, knobs=False) for rows in (1, 4))
    assert four.memory.cache_bytes == 4 * one.memory.cache_bytes
    assert four.memory.weight_bytes == one.memory.weight_bytes
    assert 1 < (four.tokens_a_second or 0) / (one.tokens_a_second or 1) < 4


def test_lengths_are_chosen_for_the_prompts(source: Path) -> None:
    prompts = Lengths({20: 50, 150: 3}, {21: 5, 160: 2}, 170)
    plan = planned(source, lengths=prompts, graphs=3, knobs=False)
    found = plan.lengths
    assert found is not None
    assert plan.options.prefill == found.chosen.lengths
    assert len(found.chosen.lengths) <= 2
    assert {step.seq for step in plan.steps} == {*found.chosen.lengths, 1}
    assert all(found.chosen.seconds <= other.seconds for other in found.others)
    assert found.curve.error < 0.2
    assert [len(usage.lengths) for usage in found.capacities] == [1, 2, 3]
    costs = [usage.seconds for usage in found.capacities]
    assert costs == sorted(costs, reverse=True)
    assert f"--prefill {','.join(map(str, found.chosen.lengths))}" in text(plan)


@pytest.mark.parametrize(
    ("prompts", "graphs", "why"),
    [
        ({300: 2, 10: 1}, 4, "2 of 3 prompts do not fit the context of 256 tokens"),
        ({10: 1}, 1, "--graphs 1 makes no sense"),
        ({10: 1}, 99, "--graphs 99 makes no sense"),
    ],
)
def test_lengths_that_cannot_be(
    source: Path, prompts: dict[int, int], graphs: int, why: str
) -> None:
    with pytest.raises(ir.InputError, match=why):
        planned(source, lengths=Lengths(prompts), graphs=graphs, knobs=False)


def test_an_encoder_has_no_cache_and_no_tokens_a_second(encoder: Exported) -> None:
    options = CompileOptions("Ascend910B4", prefill=(16, 64))
    plan = make_plan(encoder("optimum", "bert"), options, lengths=Lengths({9: 3, 60: 1}))
    assert plan.memory.cache_bytes == 0
    assert plan.tokens_a_second is None
    assert {knob.flags.split()[0] for knob in plan.knobs} >= {"--quantize", "--front"}
    assert "--kv-dtype" not in {knob.flags.split()[0] for knob in plan.knobs}
    assert plan.lengths is not None


def test_activations_in_int8_cannot_be_planned_without_their_text(source: Path) -> None:
    with pytest.raises(ir.InputError, match=r"w8a8 cannot be planned.*Plan with --quantize int8"):
        planned(source, quantize="w8a8", knobs=False)


def test_recurrent_states_are_counted_twice_and_take_no_padding(tmp_path: Path) -> None:
    ir.save(parse(recurrent()), tmp_path / "model.onnx")
    options = CompileOptions("Ascend310P3", context=32, prefill=(4, 8))
    plan = make_plan(tmp_path, options, knobs=False)
    one = sum(spec_bytes(spec) for spec in states_of(tmp_path, options))
    assert plan.memory.states == 2 * one > 0
    with pytest.raises(ir.InputError, match=r"recurrent states: padding would go into past_state"):
        make_plan(tmp_path, options, lengths=Lengths({9: 1}), knobs=False)


def states_of(path: Path, options: CompileOptions) -> list[TensorSpec]:
    """What a step reads of the states."""
    subject = open_subject(path, options)
    inputs = subject.lower(subject.options)[-1].bucket.inputs
    return [spec for spec in inputs if spec.name.startswith("past_state")]
