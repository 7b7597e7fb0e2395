"""Pipelines on models in memory, and raising as the pipeline that most callers want."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omforge import ir
from omforge.api.models import ModelLike, folder_of, load
from omforge.api.results import Result, table
from omforge.compilation.compare_feeds import make_feeds
from omforge.passes import make_pipeline
from omforge.recognition.config import read_config
from omforge.recognition.coverage import Coverage, measure
from omforge.rewriting.base import Pass
from omforge.rewriting.events import Event, events
from omforge.rewriting.instruments import CompareEach, Instrument, VerifyEach
from omforge.rewriting.pass_run import PassRun
from omforge.rewriting.pipeline import Pipeline as PassPipeline


@dataclass(frozen=True)
class Rewritten(Result):
    """A model that passes were run on.

    Attributes:
        model: The model.
        passes: What each pass did, in order: rewrites, nodes, seconds, the largest difference.
        events: What passes have to tell: above all, what they left alone and why.
        coverage: Of `raise_`: what was raised, of what the model has.
    """

    model: ir.Model
    passes: tuple[PassRun, ...]
    events: tuple[Event, ...]
    coverage: Coverage | None = None

    @property
    def rewrites(self) -> int:
        """All rewrites together."""
        return sum(run.rewrites for run in self.passes)

    @property
    def seconds(self) -> float:
        """Time in the passes themselves."""
        return sum(run.seconds for run in self.passes)

    def to_json(self) -> dict[str, Any]:
        """Return passes, events and coverage as plain data."""
        return {
            "passes": [
                {
                    "pass": str(run.step),
                    "rewrites": run.rewrites,
                    "nodes_before": run.nodes_before,
                    "nodes_after": run.nodes_after,
                    "seconds": run.seconds,
                    "max_abs_diff": run.max_abs_diff,
                }
                for run in self.passes
            ],
            "events": [dataclasses.asdict(event) for event in self.events],
            "coverage": None if self.coverage is None else self.coverage.to_json(),
        }

    def __str__(self) -> str:
        rows = [
            (
                run.step,
                run.rewrites,
                f"{run.nodes_before} -> {run.nodes_after}",
                f"{run.seconds:.2f}",
            )
            for run in self.passes
        ]
        lines = [table(("pass", "rewrites", "nodes", "seconds"), rows)]
        lines += [str(event) for event in self.events]
        if self.coverage is not None:
            kinds = self.coverage.kinds.items()
            lines.append(", ".join(f"{name} {k.found} of {k.expected}" for name, k in kinds))
        return "\n".join(lines)


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; `str()` gives text that parses back to an equal pipeline.

    Attributes:
        passes: The passes.
    """

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Return the pipeline of a text: `"canonicalize,fuse-rms-norm"`, `"raise"`.

        Options are in braces; a pass that is not installed is `package.module:Class`.

        Raises:
            InputError: It names an unknown pass or option, or an option has a wrong value.
        """
        return cls(make_pipeline(text).passes)

    def __str__(self) -> str:
        return str(PassPipeline(self.passes))

    def run(
        self,
        model: ModelLike,
        *,
        inplace: bool = False,
        compare: bool = False,
        instruments: Sequence[Instrument] | None = None,
    ) -> Rewritten:
        """Run the passes.

        Args:
            model: What `load` takes.
            inplace: Change an `onnx_ir.Model` that is given; otherwise a copy of its graph is
                changed, which shares the weights.
            compare: Run the model on the CPU before and after each pass, and stop at the first that
                moves its numbers.
            instruments: What watches the passes instead of the verifier.

        Raises:
            InputError: It is no model.
            CheckError: A pass broke the model, or moved its numbers.
        """
        loaded = load(model)
        if not inplace and not _is_new(model, loaded):
            loaded = loaded.clone()
        watch = (VerifyEach(),) if instruments is None else tuple(instruments)
        watch += (CompareEach(make_feeds),) if compare else ()
        done = PassPipeline(self.passes).run(loaded, watch)
        return Rewritten(loaded, done.passes, events(loaded))


def raise_(
    model: ModelLike,
    *,
    inplace: bool = False,
    compare: bool = False,
    instruments: Sequence[Instrument] | None = None,
) -> Rewritten:
    """Raise a model to standard ONNX operators: attention, norms, rotary embeddings, activations.

    What could not be raised is in `coverage` and `events`; nothing is refused.

    Args:
        model: What `load` takes. Of a path, config.json says what is expected.
        inplace: As in `Pipeline.run`.
        compare: As in `Pipeline.run`.
        instruments: As in `Pipeline.run`.

    Raises:
        InputError: It is no model.
        CheckError: A pass broke the model, or moved its numbers.
    """
    done = Pipeline.parse("raise").run(
        model, inplace=inplace, compare=compare, instruments=instruments
    )
    folder = folder_of(model)
    config = None if folder is None else read_config(folder)
    return dataclasses.replace(done, coverage=measure(done.model, config))


def _is_new(given: ModelLike, loaded: ir.Model) -> bool:
    """Whether nobody else holds the model."""
    return loaded is not given and loaded is not getattr(given, "model", None)
