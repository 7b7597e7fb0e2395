"""What watches a pipeline: an instrument is asked before each pass and told after it.

The names follow `mlir-opt`: verify-each, print-after, timing, bisect (LLVM's opt-bisect-limit);
the reproducer has a file of its own. `CompareEach` is our own: it runs the model on ONNX Runtime
before and after, and stops at the first pass that moves its numbers.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir import numerics
from omforge.ir.errors import CheckError, OmforgeError
from omforge.ir.infer import infer_model
from omforge.ir.ort_errors import ort_cause
from omforge.ir.text import to_text
from omforge.ir.verify import verify
from omforge.rewriting.padding import StepFeeds
from omforge.rewriting.pass_run import PassRun
from omforge.rewriting.rewrite_budget import CURRENT, RewriteBudget

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


class Instrument:
    """Does nothing at every point; subclasses override what they need."""

    def should_run(self, run: PassRun) -> bool:
        """Whether the pass may run; one instrument that says no is enough."""
        return True

    def before(self, run: PassRun, model: ir.Model) -> None:
        """Called before the pass."""

    def after(self, run: PassRun, model: ir.Model) -> None:
        """Called after the pass, which has filled in `run`."""

    def failed(self, run: PassRun, model: ir.Model, error: Exception) -> None:
        """Called when the pass or an instrument has raised; notes may be added to `error`."""


class VerifyEach(Instrument):
    """Verify the model after each pass that changed it, and stop at the first that broke it.

    Faults that the model already had are the exporter's, and blamed on no pass; one that shows once
    dtypes are inferred stops it too. Names and dtypes of inputs and outputs are part of the model,
    unless the pass declares `changes_interface`.
    """

    def __init__(self) -> None:
        self._known: frozenset[ir.Diagnostic] | None = None
        self._latent: frozenset[ir.Diagnostic] = frozenset()
        self._interface: list[str] = []

    def before(self, run: PassRun, model: ir.Model) -> None:
        """Note the faults that the model came with, and its interface."""
        if self._known is None:
            self._known = frozenset(verify(model))
            if not self._known:  # a broken graph cannot be cloned
                inferred = model.clone()
                infer_model(inferred)
                self._latent = frozenset(verify(inferred))
        self._interface = _interface(model)

    def after(self, run: PassRun, model: ir.Model) -> None:
        """Look for new faults, and at the interface again."""
        if not run.changed:
            return
        found = verify(model)
        new = [diagnostic for diagnostic in found if diagnostic not in (self._known or ())]
        own = [diagnostic for diagnostic in new if diagnostic in self._latent]
        if own:
            raise CheckError(
                "the model itself is invalid, as it was exported",
                f"\n{ir.format_diagnostics(own)}\n",
                "Export it again, with another exporter or another dtype",
            )
        if new:
            raise CheckError(
                f"{run.name} left an invalid model", f"\n{ir.format_diagnostics(new)}\n"
            )
        self._known = frozenset(found)
        interface = _interface(model)
        if interface != self._interface and not run.step.changes_interface:
            raise CheckError(
                f"{run.name} changed the model's interface",
                _interface_change(self._interface, interface),
                "Declare changes_interface, or keep names, dtypes and order",
            )


def _interface(model: ir.Model) -> list[str]:
    graph = model.graph
    return [f"input {value.name} ({value.dtype})" for value in graph.inputs] + [
        f"output {value.name} ({value.dtype})" for value in graph.outputs
    ]


def _interface_change(before: list[str], after: list[str]) -> str:
    lost, added = Counter(before) - Counter(after), Counter(after) - Counter(before)
    said = [f"lost {', '.join(lost.elements())}"] if lost else []
    said += [f"has a new {', '.join(added.elements())}"] if added else []
    return f"it {' and '.join(said) or 'has them in another order'}"


class Writable(Protocol):
    """A stream, as far as it is used here."""

    def write(self, text: str, /) -> object:
        """Write text."""
        ...


class PrintAfter(Instrument):
    """Write the model as text after passes.

    Args:
        to: A stream, or a folder for files `003_fuse-rms-norm.onnxtxt` numbered by position.
        names: The passes to print after; all if empty.
        changed: Only those that changed something.
    """

    def __init__(
        self, to: Writable | Path, names: Collection[str] = (), *, changed: bool = False
    ) -> None:
        self._to = to
        self._names = frozenset(names)
        self._changed = changed

    def after(self, run: PassRun, model: ir.Model) -> None:
        """Write the text."""
        if (self._names and run.name not in self._names) or (self._changed and not run.changed):
            return
        text = to_text(model)
        if isinstance(self._to, Path):
            self._to.mkdir(parents=True, exist_ok=True)
            (self._to / f"{run.index:03d}_{run.name}.onnxtxt").write_text(text, encoding="utf-8")
        else:
            self._to.write(f"// after {run.index}, {run.step}: {run.rewrites} rewrites\n{text}")


class Timing(Instrument):
    """Collect what each pass took and did."""

    def __init__(self) -> None:
        self._runs: list[PassRun] = []

    def after(self, run: PassRun, model: ir.Model) -> None:
        """Keep the run."""
        self._runs.append(run)

    def table(self) -> str:
        """Return one line per pass, slowest first, and the total."""
        runs = sorted(self._runs, key=lambda run: -run.seconds)
        total = sum(run.seconds for run in runs)
        lines = [
            f"{run.seconds:9.3f} s {run.seconds / (total or 1):5.0%} "
            f"{run.rewrites:6d} rewrites {run.nodes_after - run.nodes_before:+6d} nodes  {run.name}"
            for run in runs
        ]
        return "\n".join([*lines, f"{total:9.3f} s  total"])


class Bisect(Instrument):
    """Run only the first `limit` passes, to find the one that does harm by halving.

    Args:
        limit: The last position that runs; positions count from 1 and never shift.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def should_run(self, run: PassRun) -> bool:
        """Say whether the position is within the limit."""
        allowed = run.index <= self._limit
        log.info("bisect: %s pass %d, %s", "running" if allowed else "SKIPPED", run.index, run.step)
        return allowed


class BisectRewrites(Instrument):
    """Make only the first `limit` rewrites, to find the one that does harm by halving.

    A pass that is a pattern and its replacement stops behind the last one; any other is counted
    whole: it runs while there are rewrites left, and takes as many as it made.

    Args:
        limit: Rewrites that are made, of all passes together.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._budget: RewriteBudget | None = None

    def should_run(self, run: PassRun) -> bool:
        """Say whether rewrites are left."""
        if self._left <= 0:
            log.info("bisect: SKIPPED pass %d, %s: no rewrites are left", run.index, run.step)
        return self._left > 0

    def before(self, run: PassRun, model: ir.Model) -> None:
        """Give the pass what is left."""
        self._budget = RewriteBudget(self._left)
        CURRENT.set(self._budget)

    def after(self, run: PassRun, model: ir.Model) -> None:
        """Take off what it made."""
        CURRENT.set(None)
        budget = self._budget or RewriteBudget(0)
        self._left -= run.rewrites
        if budget.refused or self._left <= 0:
            whole = "" if budget.made else "; it was counted whole"
            log.info("bisect: the last rewrite is in pass %d, %s%s", run.index, run.step, whole)
            self._left = 0

    def failed(self, run: PassRun, model: ir.Model, error: Exception) -> None:
        """Let later passes be."""
        CURRENT.set(None)


class CompareEach(Instrument):
    """Run the model before and after each pass that changed it, and stop when the numbers move.

    A pass that declares `changes_interface` has nothing to be compared with; it is reported as not
    compared, and what it returns is what later passes are compared with.

    Args:
        feeds: Returns inputs for a model as it is then. Several, of different sizes: a rewrite can
            be right for one length only.
        allowed: The largest difference allowed, instead of the table's for each output's dtype.
    """

    def __init__(
        self, feeds: Callable[[ir.Model], Sequence[Feeds]], allowed: float | None = None
    ) -> None:
        self._make_feeds = feeds
        self._allowed = allowed
        self._feeds: Sequence[Feeds] = ()
        self._expected: list[dict[str, Array]] | None = None

    @property
    def feeds(self) -> Sequence[Feeds]:
        """What the model was last run on."""
        return self._feeds

    def before(self, run: PassRun, model: ir.Model) -> None:
        """Run the model, unless it is as it was after an earlier pass."""
        if self._expected is None:
            self._feeds = self._make_feeds(model)
            self._expected = self._run(model, f"the model as it is ahead of {run.name}")

    def after(self, run: PassRun, model: ir.Model) -> None:
        """Run it again and compare."""
        if not run.changed:
            return
        if run.step.changes_interface or run.step.changes_numbers:
            what = "interface" if run.step.changes_interface else "numbers"
            run.note = f"not compared: it changes the {what}"
            self._expected = None
            return
        actual = self._run(model, f"the model that {run.name} made")
        run.max_abs_diff = max(
            self._compare(run, number, *outputs)
            for number, outputs in enumerate(zip(actual, self._expected or (), strict=True))
        )
        self._expected = actual

    def _run(self, model: ir.Model, which: str) -> list[dict[str, Array]]:
        made: list[dict[str, Array]] = []
        for number, feeds in enumerate(self._feeds, 1):
            try:
                made.append(numerics.run(model, feeds))
            except OmforgeError:
                raise
            except Exception as error:  # ONNX Runtime's own have no class in common
                raise CheckError(
                    f"ONNX Runtime does not run {which}",
                    f"on feed {number} of {len(self._feeds)}: {ort_cause(error)}",
                    "Run it without --compare-each, or see the graph by --print-after",
                ) from error
        return made

    def _compare(
        self, run: PassRun, number: int, actual: dict[str, Array], expected: dict[str, Array]
    ) -> float:
        if list(actual) != list(expected):
            raise CheckError(
                f"{run.name} changed the outputs",
                f"they were {', '.join(expected)} and are {', '.join(actual)}",
                "Declare changes_interface, or keep the names",
            )
        largest = 0.0
        for name, reference in expected.items():
            made = _read(self._feeds[number], actual[name], reference)
            difference = numerics.max_abs_diff(made, reference)
            largest = max(largest, difference)
            limit = numerics.tolerance(reference.dtype.name)
            if self._allowed is None:
                equal = numerics.within(made, reference, limit)
                words = f"atol {limit.atol:g} and rtol {limit.rtol:g} are allowed"
            else:
                equal = difference <= self._allowed
                words = f"{self._allowed:g} is allowed"
            if not equal:
                raise CheckError(
                    f"{run.name} moves the numbers of {name}",
                    f"by {difference:g} on feed {number + 1} of {len(self._feeds)}; "
                    f"{words} for {reference.dtype.name}",
                    "`omforge opt` shows the graph behind it with --print-after, and keeps the one "
                    "ahead of it with --reproducer DIR",
                )
        return largest


def _read(feeds: Feeds, actual: Array, expected: Array) -> Array:
    """`actual`, with the numbers of `expected` where nobody reads them."""
    real = feeds.read(expected) if isinstance(feeds, StepFeeds) else None
    if real is None or actual.shape != expected.shape:
        return actual
    return np.where(real, actual, expected)
