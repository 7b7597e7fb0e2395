"""Steps of a compilation for a progress bar, and the bytes of the one that takes long."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
Clock = Callable[[], float]

_PATIENCE = 1.0
"""Seconds after which what is left is worth saying."""


class Steps:
    """Counts steps for a progress bar.

    Args:
        progress: Told a step's name, steps done and steps in all.
        total: Steps in all.
        clock: Seconds; what the time that is left is reckoned by.
    """

    def __init__(
        self, progress: Progress | None, total: int, clock: Clock = time.monotonic
    ) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._clock = clock

    def expect(self, total: int) -> None:
        """Say how many steps there are in all, now that more is known."""
        self._total = total

    def begin(self, name: str) -> None:
        """Go on to the next step."""
        if self._progress is not None:
            self._progress(name, self._done, self._total)
        self._done += 1

    def meter(self, name: str, unit: str = "MiB") -> Callable[[int, int], None] | None:
        """Return what is told what is done of a step, and how much there is; None if nobody looks.

        It shows both, and how long the rest will take at the pace since it was told first.

        Args:
            name: Of the step.
            unit: `MiB` where bytes are counted; anything else is shown as it is.
        """
        progress = self._progress
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
