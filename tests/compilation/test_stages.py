"""A compilation can be stopped behind a stage, gone on with, and given a stage of one's own."""

import dataclasses
from pathlib import Path

import pytest

from omforge import ir
from omforge.compilation.buckets import Lowered
from omforge.compilation.graph_plan import GraphPlan
from omforge.compilation.options import CompileOptions
from omforge.compilation.raising import Loaded, Raised
from omforge.compilation.request import Request
from omforge.compilation.stages import STAGES, Built, Stage, run_stages
from omforge.compilation.work import Work
from omforge.ir.text import to_text
from tests.exports import export

OPTIONS = CompileOptions("Ascend910B4", context=32, prefill=(8,))


@pytest.fixture
def request_(tmp_path) -> Request:
    source = export("optimum", "llama_gqa", tmp_path / "export")
    options = dataclasses.replace(
        OPTIONS, build=dataclasses.replace(OPTIONS.build, atc="none", cache=None)
    )
    return Request(source, tmp_path / "bundle", options)


def files(request: Request) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(Path(request.output).iterdir())}


def test_a_stage_can_be_the_last_and_gone_on_from(request_: Request) -> None:
    run_stages(request_)
    at_once = files(request_)
    raised = run_stages(request_, until="raise")
    assert isinstance(raised, Raised)
    assert raised.coverage.complete
    assert [plan.name for plan in raised.plans] == ["prefill_s8", "decode"]
    assert isinstance(run_stages(raised), Built)
    assert files(request_) == at_once


def test_lowering_leaves_its_graph_alone(request_: Request) -> None:
    canonical = run_stages(request_, until="serve")
    first = run_stages(canonical, until="lower")
    again = run_stages(canonical, until="lower")
    assert isinstance(first, Lowered)
    assert isinstance(again, Lowered)
    assert not Path(request_.output).exists()  # nothing is written before `write`
    for one, other in zip(first.graphs, again.graphs, strict=True):
        assert one.bucket == other.bucket
        assert to_text(one.model) == to_text(other.model)


def test_a_value_can_be_changed_between_two_stages(request_: Request) -> None:
    raised = run_stages(request_, until="raise")
    assert isinstance(raised, Raised)
    more = dataclasses.replace(raised, plans=(GraphPlan("prefill", "prefill_s4", 4), *raised.plans))
    built = run_stages(more)
    assert isinstance(built, Built)
    assert [bucket.seq for bucket in built.manifest.buckets] == [4, 8, 1]


def test_a_stage_can_be_replaced(request_: Request) -> None:
    seen: list[str] = []

    def raise_and_look(loaded: Loaded, work: Work) -> Raised:
        raised = stage.run(loaded, work)
        assert isinstance(raised, Raised)
        seen.extend(node.op_type for node in raised.model.graph)
        return raised

    stage = next(stage for stage in STAGES if stage.name == "raise")
    mine = [Stage("raise", Loaded, raise_and_look) if s is stage else s for s in STAGES]
    run_stages(request_, until="serve", stages=mine)
    assert "Attention" in seen


def test_a_stage_ahead_of_the_value_is_refused(request_: Request) -> None:
    canonical = run_stages(request_, until="serve")
    with pytest.raises(ir.InputError, match="stage 'raise' cannot be run on Canonical"):
        run_stages(canonical, until="raise")
    with pytest.raises(ir.InputError, match="there is no stage 'fuse'"):
        run_stages(canonical, until="fuse")
