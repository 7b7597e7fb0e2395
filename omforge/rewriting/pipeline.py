"""Passes in order, run on a model under the eyes of instruments."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from omforge import ir
from omforge.ir.errors import CheckError
from omforge.rewriting.base import Pass
from omforge.rewriting.fingerprint import Fingerprint, fingerprint
from omforge.rewriting.instruments import Instrument, VerifyEach
from omforge.rewriting.pass_error import meant, pass_error
from omforge.rewriting.pass_run import PassRun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineResult:
    """What every pass of a pipeline did, in order."""

    passes: tuple[PassRun, ...]

    @property
    def rewrites(self) -> int:
        """All rewrites together."""
        return sum(run.rewrites for run in self.passes)


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. `str()` gives text that parses back to an equal pipeline."""

    passes: tuple[Pass, ...] = field(default=())

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.passes)

    def run(
        self,
        model: ir.Model,
        instruments: Sequence[Instrument] | None = None,
        *,
        first: int = 1,
    ) -> PipelineResult:
        """Run the passes on `model`, in place.

        Args:
            model: The model.
            instruments: What watches each pass, called in this order; the model is verified after
                each pass if this is None, and nothing watches if it is empty.
            first: Number of the first pass, where others have run before.

        Raises:
            OmforgeError: A pass or an instrument failed, or a pass that is watched changed the
                model and returned 0; the model is then in an undefined state.
        """
        if instruments is None:
            instruments = (VerifyEach(),)
        done: list[PassRun] = []
        nodes = _count(model)
        state = fingerprint(model) if instruments else None
        for index, step in enumerate(self.passes, first):
            count = first - 1 + len(self.passes)
            run = PassRun(index, step, count=count, nodes_before=nodes, nodes_after=nodes)
            done.append(run)
            # A list, not a generator: every instrument is asked, also after one has said no.
            run.skipped = not all([watch.should_run(run) for watch in instruments])
            if not run.skipped:
                state = _run_watched(run, model, instruments, state)
                nodes = run.nodes_after
        return PipelineResult(tuple(done))


def _run_watched(
    run: PassRun,
    model: ir.Model,
    instruments: Sequence[Instrument],
    state: Fingerprint | None,
) -> Fingerprint | None:
    """Run one pass; `state` is the model before it, and what is returned the model after it."""
    try:
        for watch in instruments:
            watch.before(run, model)
        _run(run, model)
        if state is not None:
            state = _checked_count(run, state, fingerprint(model))
        for watch in instruments:
            watch.after(run, model)
    except Exception as error:  # whatever it is, instruments are told and it goes on up
        for watch in instruments:
            watch.failed(run, model, error)
        error.add_note(f"in pass {run.index} of {run.count}, {run.step}")
        raise
    return state


def _run(run: PassRun, model: ir.Model) -> None:
    start = time.perf_counter()
    try:
        run.rewrites = run.step.run(model)
    except Exception as error:
        if meant(error):
            raise
        raise pass_error(run.step, error) from error
    run.seconds = time.perf_counter() - start
    run.nodes_after = _count(model)
    log.debug("%s: %d rewrites in %.3f s", run.step, run.rewrites, run.seconds)


def _checked_count(run: PassRun, before: Fingerprint, after: Fingerprint) -> Fingerprint:
    """Instruments look where a pass says that it changed something: it must not say otherwise."""
    difference = "" if run.rewrites else before.difference(after)
    if difference:
        raise CheckError(
            f"{run.name} changed the model and returned 0",
            f"the first thing that differs: {difference}",
            "Return the number of rewrites from its run(): 0 says that the model is untouched",
        )
    return after


def _count(model: ir.Model) -> int:
    return sum(len(graph) for graph in ir.all_graphs(model))
