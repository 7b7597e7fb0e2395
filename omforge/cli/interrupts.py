"""Whether Ctrl-C has been pressed, whatever became of the KeyboardInterrupt.

Extension modules that are interrupted while they are imported raise errors of their own instead
("initialization failed"), so what counts is that the signal came.
"""

from __future__ import annotations

import signal
from types import FrameType

_came: list[int] = []


def interrupted() -> bool:
    """Whether it has."""
    return bool(_came)


def note_interrupts() -> None:
    """Take note of SIGINT from here on; where it is ignored it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_interrupt)


def _on_interrupt(number: int, _: FrameType | None) -> None:
    _came.append(number)
    raise KeyboardInterrupt
