"""A pass that fails leaves a graph and a command, and the command runs as it is printed."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from omforge import ir
from omforge.cli import app as cli
from omforge.compilation.compare_feeds import make_feeds
from omforge.passes import PASSES, RewritePass
from omforge.rewriting.base import Pass
from omforge.rewriting.instruments import CompareEach
from omforge.rewriting.padding import StepFeeds
from omforge.rewriting.pass_error import PassError
from omforge.rewriting.pipeline import Pipeline
from omforge.rewriting.reproducer import KEPT_UNASKED, Reproducer, save_feeds, saved_feeds
from omforge.testing import parse, several_feeds

MODEL = """<ir_version: 10, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 4] y) <float two = {2.0}> { h = Neg (x) y = Mul (h, two) }"""


@dataclass(frozen=True)
class Crash(RewritePass):
    """Fail at a node, with half of the work done."""

    name: ClassVar[str] = "crash"
    depth: int = 1

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(x)

    def rewrite(self, op: Any, m: Any) -> Any:
        return [][self.depth]


@dataclass(frozen=True)
class Halve(Pass):
    """Move the numbers."""

    name: ClassVar[str] = "halve"

    def run(self, model: ir.Model) -> int:
        model.graph.initializers["two"].const_value = ir.tensor(1.0, ir.DataType.FLOAT)
        return 1


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "crash", Crash)
    monkeypatch.setitem(PASSES, "halve", Halve)


def reproduced(notes: list[str] | str) -> tuple[str, Any]:
    """The command that was printed, and what came of running it."""
    text = notes if isinstance(notes, str) else "\n".join(notes)
    command = re.search("reproduce: omforge (.*)", text)
    assert command is not None, text
    return command[1], CliRunner().invoke(cli.app, shlex.split(command[1]))


def test_an_unexpected_failure_names_pass_and_site_and_leaves_a_command(tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    ir.save(parse(MODEL), file)
    done = CliRunner().invoke(cli.app, ["opt", str(file), "-p", "remove-no-ops,crash{depth=3}"])
    first, *others = done.stderr.splitlines()
    assert (done.exit_code, first) == (
        1,
        "error: the pass crash failed with IndexError: list index out of range",
    )
    assert others[0] == (
        f"  why:  at Neg -> h; that is a fault of {__name__}:Crash, at test_reproducer.py:42 in rewrite"
    )
    assert "  in pass 2 of 2, crash{depth=3}" in others
    assert "Traceback" not in done.stderr
    command, again = reproduced(done.stderr)
    assert command.endswith("/before-crash.onnx -p 'crash{depth=3}'")
    assert again.stderr.splitlines()[0] == first


def test_what_moves_the_numbers_is_reproduced_on_the_same_feeds(tmp_path: Path) -> None:
    model = parse(MODEL)
    compare = CompareEach(several_feeds)
    with pytest.raises(ir.CheckError) as caught:
        Pipeline((Halve(),)).run(model, [Reproducer(tmp_path / "r", [compare], PASSES), compare])
    command, again = reproduced(caught.value.__notes__)
    assert "--compare-each --feeds" in command
    assert caught.value.why.split(";")[0] in again.stderr


def test_without_a_folder_a_failure_on_purpose_keeps_nothing() -> None:
    compare = CompareEach(several_feeds)
    with pytest.raises(ir.CheckError) as caught:
        Pipeline((Halve(),)).run(parse(MODEL), [Reproducer(None, [compare]), compare])
    assert caught.value.__notes__ == ["in pass 1 of 1, halve"]


def test_nothing_large_is_kept_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omforge.rewriting.reproducer.KEPT_UNASKED", 3)
    assert KEPT_UNASKED == 1 << 30
    with pytest.raises(PassError) as caught:
        Pipeline((Crash(),)).run(parse(MODEL), [Reproducer()])
    assert "was not kept: it has 0 MiB of weights" in caught.value.__notes__[0]


def test_the_graph_that_is_kept_is_the_one_ahead_of_the_pass(tmp_path: Path) -> None:
    class Half(Pass):
        name = "half"

        def run(self, model: ir.Model) -> int:
            model.graph.remove(model.graph[0])
            raise ValueError("a bug")

    with pytest.raises(PassError, match="a bug") as caught:
        Pipeline((Halve(), Half())).run(parse(MODEL), [Reproducer(tmp_path, registry=PASSES)])
    kept = ir.load(tmp_path / "before-half.onnx")
    assert [node.op_type for node in kept.graph] == ["Neg", "Mul"]
    assert float(kept.graph.initializers["two"].const_value.numpy()) == 1.0
    assert "options only of Python's" in caught.value.__notes__[0]  # no pass of that name


def test_feeds_come_back_as_they_were(tmp_path: Path) -> None:
    feeds = [
        StepFeeds({"x/0": np.ones(2, ml_dtypes.bfloat16)}, np.array([0, 1]), 3, 4),
        {"x/0": np.zeros(2, ml_dtypes.bfloat16)},
    ]
    save_feeds(feeds, tmp_path / "f.npz")
    value = ir.Value(name="x/0", type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape([2]))
    model = ir.Model(ir.Graph([value], [], nodes=[]), ir_version=10)
    first, second = saved_feeds(tmp_path / "f.npz")(model)
    assert isinstance(first, StepFeeds)
    assert first.tokens.tolist() == [3, 4, 0, 1]
    assert first["x/0"].dtype == ml_dtypes.bfloat16
    assert second["x/0"].tolist() == [0, 0]


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_what_is_no_file_of_feeds_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "f.npz").write_bytes(content)
    with pytest.raises(ir.InputError, match="cannot read feeds from"):
        saved_feeds(tmp_path / "f.npz")


def test_feeds_of_another_model_are_refused(
    tmp_path: Path, exported: Callable[[str, str], Path]
) -> None:
    model = ir.load(exported("optimum", "llama_gqa"))
    save_feeds(make_feeds(model), tmp_path / "f.npz")
    with pytest.raises(ir.InputError, match="does not fit the model: it feeds input_ids"):
        saved_feeds(tmp_path / "f.npz")(parse(MODEL))
