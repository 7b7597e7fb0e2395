"""`compile --plan auto`, `--memory` and `--budget rest`: what is decided ahead of the long work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import omforge
from omforge import ir
from omforge.bundle.chunks import cheapest_chunks
from omforge.compilation import serving
from omforge.compilation.stages import STAGES
from omforge.planning.lengths import Lengths
from omforge.planning.stage import PlanRequest
from omforge.runtime.generate import LanguageModel

Exported = Callable[[str, str], Path]
SOC = "Ascend910B4"


@pytest.fixture
def source(exported: Exported) -> Path:
    return exported("optimum", "llama_gqa")


def compiled(source: Path, folder: Path, **asked: Any) -> omforge.Bundle:
    asked.setdefault("context", 128)
    return omforge.compile(source, target=SOC, output=folder / "b", atc="none", **asked)


def written(folder: Path, text: str) -> Path:
    (folder / "lengths.txt").write_text(text)
    return folder / "lengths.txt"


def test_without_a_plan_the_stages_are_as_they_are() -> None:
    assert PlanRequest().stages() is STAGES
    names = [stage.name for stage in PlanRequest(lengths=Lengths({1: 1})).stages()]
    assert names == ["read", "load", "raise", "plan", "serve", "lower", "write", "build"]


def test_lengths_are_the_plans(source: Path, tmp_path: Path) -> None:
    lengths = written(tmp_path, "20\n" * 50 + "100\n")
    bundle = compiled(source, tmp_path, plan="auto", lengths=lengths, graphs=3)
    plan = omforge.plan(source, target=SOC, context=128, lengths=lengths, graphs=3, knobs=False)
    assert plan.plan.lengths is not None
    chosen = plan.plan.lengths.chosen.lengths
    assert [b.seq for b in bundle.manifest.buckets] == [*chosen, 1]
    # The runtime cuts prompts by the plan's costs, and computes what it would otherwise.
    costs = {size: plan.plan.lengths.curve(size) for size in chosen}
    assert bundle.manifest.costs == pytest.approx({str(s): c for s, c in costs.items()}, rel=1e-5)
    with bundle.session() as model:
        assert isinstance(model, LanguageModel)
        for tokens in (1, 20, 100):
            expected = [count for _, count in cheapest_chunks(tokens, costs)]
            assert model.chunk_sizes(tokens) == expected
    assert bundle.verify(steps=1).ok
    assert bundle.compiled is not None
    told = [event for event in bundle.compiled.events if event.pass_name == "plan"]
    assert "for 51 prompts" in told[0].reason


def test_answers_choose_the_context(source: Path, tmp_path: Path) -> None:
    lengths = written(tmp_path, "20 30\n40 21\n")
    bundle = compiled(source, tmp_path, plan="auto", lengths=lengths, context=None)
    assert bundle.manifest.context == 64  # 61 tokens, in blocks of 16


def test_what_has_no_room_is_refused_ahead_of_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = omforge.plan(source, target=SOC, context=128, knobs=False).total
    compiled(source, tmp_path, memory=str(total))
    with monkeypatch.context() as patch:
        # Nothing that a compilation writes or measures is reached.
        patch.setattr("omforge.compilation.writing.MadeFolder", None)
        with pytest.raises(ir.CheckError) as found:
            compiled(source, tmp_path / "x", memory=str(total - 1))
    assert "does not fit" in found.value.what
    assert f"= {total:,} bytes, 1 too many" in found.value.why
    assert "--quantize int8" in found.value.next_step
    assert not (tmp_path / "x").exists()
    assert serving.serve is STAGES[3].run


def test_a_budget_is_what_the_memory_leaves(source: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"context": 128, "quantize": "int4:g32"}
    least = omforge.plan(source, target=SOC, knobs=False, **asked)
    floats = omforge.plan(source, target=SOC, context=128, knobs=False)
    memory = (least.total + floats.total) // 2
    bundle = compiled(source, tmp_path, memory=str(memory), budget="rest", **asked)
    held = bundle.plan().total
    assert least.total < held <= memory
    assert bundle.manifest.quantization.budget == memory - (
        least.total - least.plan.memory.weight_bytes
    )
    with pytest.raises(ir.CheckError, match=r"a budget of .* does not fit in .*--budget rest"):
        compiled(source, tmp_path / "x", memory=str(memory), budget=str(memory), **asked)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"memory": "six"}, "'six' is no size"),
        ({"memory": "0"}, "'0' is no size"),
        ({"budget": "rest", "quantize": "int4"}, "--budget rest without --memory"),
        ({"plan": "auto"}, "--plan auto without --lengths"),
        ({"plan": "manual", "lengths": "x"}, "it is auto or absent"),
        ({"lengths": "x"}, "--lengths x without --plan auto"),
        ({"plan": "auto", "lengths": "x", "prefill": (8,)}, "--plan auto with --prefill"),
        ({"plan": "auto", "lengths": "no-such-file"}, "cannot read the lengths no-such-file"),
    ],
)
def test_what_makes_no_sense_says_so(
    source: Path, tmp_path: Path, asked: dict[str, Any], why: str
) -> None:
    with pytest.raises(ir.InputError, match=why):
        compiled(source, tmp_path, **asked)
