"""What a compilation is worked on with: the instruments, and a progress bar's steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from omforge import ir
from omforge.rewriting.instruments import Instrument, VerifyEach
from omforge.rewriting.pass_run import PassRun
from omforge.rewriting.pipeline import Pipeline

Progress = Callable[[str, int, int], None]
Clock = Callable[[], float]

_FIXED_STEPS = 4
"""Load, raise, convert precision, write canonical.onnx; each bucket is lowered and written."""

_PATIENCE = 1.0
"""Seconds after which what is left is worth saying."""


class Work:
    """Runs passes under the eyes of instruments, and counts steps for a progress bar.

    Args:
        instruments: What watches the passes; the verifier alone if None.
        progress: Told a step's name, steps done and steps in all.
        clock: Seconds; what the time that is left is reckoned by.
    """

    def __init__(
        self,
        instruments: Sequence[Instrument] | None = None,
        progress: Progress | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._instruments = (VerifyEach(),) if instruments is None else instruments
        self.progress = progress
        self._total = _FIXED_STEPS
        self._done = 0
        self._passes = 0
        self._clock = clock

    def run(self, model: ir.Model, pipeline: Pipeline) -> tuple[PassRun, ...]:
        """Run passes on a model, in place, and return what each did; they are numbered through."""
        runs = pipeline.run(model, self._instruments, first=self._passes + 1).passes
        self._passes += len(runs)
        return runs

    def expect(self, graphs: int) -> None:
        """Say how many graphs are lowered, and so how many steps there are."""
        self._total = _FIXED_STEPS + 2 * graphs

    def begin(self, name: str) -> None:
        """Go on to the next step."""
        if self.progress is not None:
            self.progress(name, self._done, self._total)
        self._done += 1

    def meter(self, name: str, unit: str = "MiB") -> Callable[[int, int], None] | None:
        """Return what is told what is done of a step, and how much there is; None if nobody looks.

        It shows both, and how long the rest will take at the pace since it was told first.

        Args:
            name: Of the step.
            unit: `MiB` where bytes are counted; anything else is shown as it is.
        """
        progress = self.progress
        if progress is None:
            return None
        first: list[tuple[float, int]] = []
        size = 1 << 20 if unit == "MiB" else 1

        def told(done: int, total: int) -> None:
            now = self._clock()
            first.append((now, done))
            began, before = first[0]
            text = f"{name}: {done // size:,} of {total // size:,} {unit}"
            if now - began >= _PATIENCE and done > before:
                left = round((now - began) * (total - done) / (done - before))
                text += f", {left // 60}:{left % 60:02} left"
            progress(text, done, total)
            del first[1:]

        return told
