"""Instruments: what each sees, writes and stops."""

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from omforge import ir
from omforge.ir.errors import CheckError
from omforge.ir.infer import infer_model
from omforge.rewriting.base import Pass
from omforge.rewriting.instruments import (
    Bisect,
    BisectRewrites,
    CompareEach,
    Instrument,
    PrintAfter,
    Timing,
    VerifyEach,
)
from omforge.rewriting.pass_error import PassError
from omforge.rewriting.pass_run import PassRun
from omforge.rewriting.pipeline import Pipeline
from omforge.rewriting.rewrite import Builder, Match, Pat, PatternOps, RewritePass
from omforge.testing import parse, several_feeds

MODEL = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 4] x) => (float[N, 4] y) <float two = {2.0}> { h = Neg (x) y = Mul (h, two) }"""


class Nothing(Pass):
    """Change nothing."""

    name = "nothing"

    def run(self, model: ir.Model) -> int:
        return 0


class NegToSub(Pass):
    """Rewrite Neg(x) as x - 2x, which is equal."""

    name = "neg-to-sub"

    def run(self, model: ir.Model) -> int:
        return _replace_neg(model, "Sub", double=True)


class NegToAbs(Pass):
    """Rewrite Neg(x) as Abs(x), which is not equal."""

    name = "neg-to-abs"

    def run(self, model: ir.Model) -> int:
        return _replace_neg(model, "Abs")


class Dangle(Pass):
    """Take a node away that is used."""

    name = "dangle"

    def run(self, model: ir.Model) -> int:
        model.graph.remove(model.graph[0])
        return 1


class Touch(Pass):
    """Say that something changed."""

    name = "touch"

    def run(self, model: ir.Model) -> int:
        return 1


class RenameOutput(Pass):
    """Give the output another name."""

    name = "rename-output"

    def run(self, model: ir.Model) -> int:
        model.graph.outputs[0].name = "z"
        return 1


class NewInterface(RenameOutput):
    """The same, said openly."""

    name = "new-interface"
    changes_interface = True


@dataclass(frozen=True)
class Crash(Pass):
    """Fail after half of the work."""

    name: ClassVar[str] = "crash"
    depth: int = 1

    def run(self, model: ir.Model) -> int:
        model.graph.remove(model.graph[0])
        raise ValueError("a bug")


class InferTypes(Pass):
    name = "infer-types"

    def run(self, model: ir.Model) -> int:
        infer_model(model)
        return 1


def _replace_neg(model: ir.Model, op_type: str, *, double: bool = False) -> int:
    negs = [node for node in model.graph if node.op_type == "Neg"]
    for neg in negs:
        x = neg.inputs[0]
        new = [ir.node("Add", [x, x])] if double else []
        new.append(ir.node(op_type, [x, new[0].outputs[0]] if double else [x]))
        model.graph.insert_before(neg, new)
        neg.outputs[0].replace_all_uses_with(new[-1].outputs[0])
        model.graph.remove(neg, safe=True)
    return len(negs)


def run(passes: list[Pass], *instruments: Instrument) -> tuple[PassRun, ...]:
    return Pipeline(tuple(passes)).run(parse(MODEL), instruments).passes


# --- the protocol -----------------------------------------------------------------------------


def test_instruments_are_called_around_each_pass_in_order() -> None:
    calls: list[str] = []

    class Log(Instrument):
        def __init__(self, tag: str) -> None:
            self.tag = tag

        def before(self, run: PassRun, model: ir.Model) -> None:
            calls.append(f"{self.tag} before {run.name} {run.rewrites}")

        def after(self, run: PassRun, model: ir.Model) -> None:
            calls.append(f"{self.tag} after {run.name} {run.rewrites}")

        def failed(self, run: PassRun, model: ir.Model, error: Exception) -> None:
            calls.append(f"{self.tag} failed {run.name} {error.__cause__}")

    with pytest.raises(PassError, match="ValueError: a bug"):
        run([NegToSub(), Crash()], Log("1"), Log("2"))
    assert calls == [
        "1 before neg-to-sub 0",
        "2 before neg-to-sub 0",
        "1 after neg-to-sub 1",
        "2 after neg-to-sub 1",
        "1 before crash 0",
        "2 before crash 0",
        "1 failed crash a bug",
        "2 failed crash a bug",
    ]


def test_a_pass_that_an_instrument_skips_is_reported() -> None:
    class Never(Instrument):
        def should_run(self, run: PassRun) -> bool:
            return run.name != "crash"

    crash, sub = run([Crash(), NegToSub()], Never())
    assert crash.skipped
    assert (sub.skipped, sub.rewrites) == (False, 1)


# --- VerifyEach -------------------------------------------------------------------------------


def test_verify_each_stops_at_the_pass_that_broke_the_model() -> None:
    with pytest.raises(CheckError) as caught:
        run([NegToSub(), Dangle(), Nothing()], VerifyEach())
    assert str(caught.value).startswith("dangle left an invalid model: ")
    assert caught.value.__notes__ == ["in pass 2 of 3, dangle"]


def test_verifying_is_on_by_default() -> None:
    with pytest.raises(CheckError, match="dangle left an invalid model"):
        Pipeline((Dangle(),)).run(parse(MODEL))


def test_verify_each_blames_no_pass_for_what_the_export_had() -> None:
    model = parse(MODEL)
    model.graph.remove(model.graph[0])  # leaves a dangling edge
    (touch,) = Pipeline((Touch(),)).run(model, [VerifyEach()]).passes
    assert touch.changed


def test_verify_each_says_so_where_the_export_is_invalid() -> None:
    """Its fault shows only once the dtype between the two nodes is inferred."""
    model = parse("""
        <ir_version: 11, opset_import: ["" : 24]>
        g (float[2] x) => (float[2] y) {
            wide = Cast <to = 14> (x)
            product = Mul (wide, wide)
            y = Cast <to = 1> (product)
        }""")
    for node in model.graph:
        if not node.outputs[0].is_graph_output():
            node.outputs[0].type = None  # as exporters leave it
    with pytest.raises(CheckError) as caught:
        Pipeline((InferTypes(),)).run(model)
    text = str(caught.value)
    assert text.startswith("the model itself is invalid, as it was exported: ")
    assert "Mul does not take COMPLEX64" in text
    assert "at Mul " in text


def test_verify_each_holds_the_interface() -> None:
    with pytest.raises(CheckError) as caught:
        run([RenameOutput()], VerifyEach())
    assert str(caught.value) == (
        "rename-output changed the model's interface: it lost output y (FLOAT) and has a new output "
        "z (FLOAT). Declare changes_interface, or keep names, dtypes and order"
    )
    (new,) = run([NewInterface()], VerifyEach())
    assert new.changed


TWO_OUTPUTS = """<ir_version: 11, opset_import: ["" : 24]>
g (float[4] x) => (float[4] y, float[4] z) { y = Neg (x) z = Abs (x) }"""


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda outputs: outputs.pop(), "it lost output z (FLOAT)."),
        (lambda outputs: outputs.append(outputs[0]), "it has a new output y (FLOAT)."),
        (lambda outputs: outputs.reverse(), "it has them in another order."),
    ],
)
def test_verify_each_says_what_of_the_interface_changed(edit: Any, words: str) -> None:
    class Edit(Pass):
        name = "edit"

        def run(self, model: ir.Model) -> int:
            edit(model.graph.outputs)
            return 1

    with pytest.raises(CheckError) as caught:
        Pipeline((Edit(),)).run(parse(TWO_OUTPUTS))
    assert words in str(caught.value)


# --- PrintAfter -------------------------------------------------------------------------------


def test_print_after_writes_to_a_stream() -> None:
    stream = io.StringIO()
    run([Nothing(), NegToSub()], PrintAfter(stream, changed=True))
    assert stream.getvalue().startswith("// after 2, neg-to-sub: 1 rewrites\n<")
    assert "Sub" in stream.getvalue()


def test_print_after_writes_numbered_files(tmp_path: Path) -> None:
    run([Nothing(), NegToSub(), Nothing()], PrintAfter(tmp_path / "ir", names=["nothing"]))
    files = sorted((tmp_path / "ir").iterdir())
    assert [file.name for file in files] == ["001_nothing.onnxtxt", "003_nothing.onnxtxt"]
    assert "Neg" in files[0].read_text()
    assert "Neg" not in files[1].read_text()
    ir.from_onnx_text(files[1].read_text())


# --- Timing, Bisect --------------------------------------------------------------------------


def test_timing_has_a_line_per_pass_and_a_total() -> None:
    timing = Timing()
    run([Nothing(), NegToSub()], timing)
    *lines, total = timing.table().splitlines()
    assert sorted(line.split()[-1] for line in lines) == ["neg-to-sub", "nothing"]
    assert any("1 rewrites     +1 nodes" in line for line in lines)
    assert total.endswith("total")


def test_bisect_runs_the_first_passes_and_names_all(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="omforge.rewriting.instruments"):
        runs = run([Nothing(), NegToSub(), NegToAbs()], Bisect(2))
    assert [one.skipped for one in runs] == [False, False, True]
    assert caplog.messages == [
        "bisect: running pass 1, nothing",
        "bisect: running pass 2, neg-to-sub",
        "bisect: SKIPPED pass 3, neg-to-abs",
    ]


class NegToMul(RewritePass):
    """Rewrite Neg(x) as x * -1, a site at a time."""

    name = "neg-to-mul"

    def pattern(self, op: PatternOps, x: Pat) -> Pat:
        return op.Neg(x)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        return op.Mul(m.x, -1.0)


class AbsToMax(Pass):
    """Rewrite every Abs(x) as Max(x, -x), all at once."""

    name = "abs-to-max"

    def run(self, model: ir.Model) -> int:
        found = [node for node in model.graph if node.op_type == "Abs"]
        for node in found:
            node.op_type = "Relu"
        return len(found)


NEGS = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 4] x) => (float[N, 4] y)
{ a = Neg (x) b = Neg (a) c = Neg (b) d = Abs (c) e = Abs (d) y = Exp (e) }"""


@pytest.mark.parametrize(
    ("limit", "left", "rewrites"),
    [
        (0, 3, (0, 0)),
        (1, 2, (1, 0)),
        (2, 1, (2, 0)),
        (3, 0, (3, 0)),
        (4, 0, (3, 2)),
        (9, 0, (3, 2)),
    ],
)
def test_bisect_stops_inside_a_pass_that_goes_site_by_site(
    limit: int, left: int, rewrites: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """One that works on all at once is counted whole: it runs while anything is left."""
    model = parse(NEGS)
    with caplog.at_level(logging.INFO, logger="omforge"):
        result = Pipeline((NegToMul(), AbsToMax())).run(model, [BisectRewrites(limit)])
    assert [node.op_type for node in model.graph].count("Neg") == left
    assert tuple(run.rewrites for run in result.passes) == rewrites
    assert result.passes[1].skipped == (limit <= 3)
    if limit == 1:
        assert "bisect: 0 left behind the rewrite neg-to-mul at Neg -> c" in caplog.messages
        assert "bisect: the last rewrite is in pass 1, neg-to-mul" in caplog.messages
    if limit == 3:  # which ends just here, and not inside
        assert caplog.messages[-2:] == [
            "bisect: the last rewrite is in pass 1, neg-to-mul",
            "bisect: SKIPPED pass 2, abs-to-max: no rewrites are left",
        ]
    if limit == 4:
        assert caplog.messages[-1].endswith("in pass 2, abs-to-max; it was counted whole")
    assert NegToMul().run(parse(NEGS)) == 3  # nobody watches: nothing is left over


def test_numbers_go_on_where_other_passes_have_run() -> None:
    result = Pipeline((Nothing(), NegToSub())).run(parse(MODEL), [], first=5)
    assert [(run.index, run.count) for run in result.passes] == [(5, 6), (6, 6)]


# --- CompareEach ------------------------------------------------------------------------------


def test_compare_each_reports_the_difference() -> None:
    nothing, sub = run([Nothing(), NegToSub()], CompareEach(several_feeds))
    assert nothing.max_abs_diff is None
    assert sub.max_abs_diff is not None
    assert sub.max_abs_diff < 1e-5


def test_compare_each_stops_at_the_first_pass_that_moves_the_numbers() -> None:
    with pytest.raises(CheckError) as caught:
        run([Nothing(), NegToAbs(), NegToSub()], CompareEach(several_feeds))
    text = str(caught.value)
    assert text.startswith("neg-to-abs moves the numbers of y: by ")
    assert "on feed 1 of 3; atol 0.0001 and rtol 0.0001 are allowed for float32" in text
    assert text.endswith("keeps the one ahead of it with --reproducer DIR")


def test_compare_each_says_so_where_the_model_does_not_run() -> None:
    class Unrunnable(Pass):
        """Ask for an operator that ONNX Runtime does not have."""

        name = "unrunnable"

        def run(self, model: ir.Model) -> int:
            model.graph[0].op_type = "NobodyHasThis"
            return 1

    with pytest.raises(CheckError, match="does not run the model that unrunnable made: on feed 1"):
        run([Unrunnable()], CompareEach(several_feeds))
    with pytest.raises(CheckError, match="does not run the model as it is ahead of nothing"):
        run([Unrunnable(), Nothing()], _From(2, CompareEach(several_feeds)))


class _From(Instrument):
    """Another instrument, from a position on."""

    def __init__(self, index: int, watch: Instrument) -> None:
        self.index, self.watch = index, watch

    def before(self, run: PassRun, model: ir.Model) -> None:
        if run.index >= self.index:
            self.watch.before(run, model)


def test_compare_each_takes_a_tolerance() -> None:
    (away,) = run([NegToAbs()], CompareEach(several_feeds, allowed=1e3))
    assert away.max_abs_diff is not None
    assert away.max_abs_diff > 1
    with pytest.raises(CheckError, match="0 is allowed for float32"):
        run([NegToAbs()], CompareEach(several_feeds, allowed=0.0))


def test_compare_each_lets_a_pass_change_the_interface_if_it_says_so() -> None:
    with pytest.raises(
        CheckError, match="rename-output changed the outputs: they were y and are z"
    ):
        run([RenameOutput()], CompareEach(several_feeds))
    new, sub = run([NewInterface(), NegToSub()], CompareEach(several_feeds))
    assert new.note == "not compared: it changes the interface"
    assert new.max_abs_diff is None
    assert sub.max_abs_diff is not None
