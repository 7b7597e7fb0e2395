"""Ctrl-C: one line and status 130, at whatever moment it comes.

While the program starts and ends there is nothing to take back, and it ends at once. While a
command runs, KeyboardInterrupt unwinds it; but an import is finished first, since an extension
module that is interrupted raises errors of its own ("initialization failed") or crashes. What
becomes of the exception does not matter (a callback may lose it, and code of `exec` marks the
process to be ended by the signal): what counts is that the signal came. Before this module is
imported, which is some 30 ms, Python itself answers.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import NoReturn

STATUS = 130
TOLD = "interrupted: what was complete stays, and nothing half-written"

_PATIENCE = 3.0  # seconds for an import
_POLL_SECONDS = 0.02
_IMPORTS = "<frozen importlib._bootstrap>"

_came: list[float] = []
_running: list[bool] = []
_said: list[bool] = []


def interrupted() -> bool:
    """Whether it has been pressed."""
    return bool(_came)


def note_interrupts() -> None:
    """Take note of SIGINT from here on; where it is ignored it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGALRM, _on_interrupt)
        signal.signal(signal.SIGINT, _on_interrupt)
        sys.unraisablehook = _on_unraisable


class Unwinding:
    """While a command runs: it has something to take back."""

    def __enter__(self) -> None:
        _running.append(True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _running.pop()


def said() -> None:
    """Take note that the user has been told."""
    _said.append(True)


def end() -> NoReturn:
    """End the process, telling of it unless that is done.

    Not by an exception: modules that were half imported cannot be trusted to be taken down.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, RuntimeError, ValueError):  # its reader went away, or it is being written
            continue
    if not _said:
        os.write(2, f"error: {TOLD}\n".encode())
    os._exit(STATUS)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    _came.append(time.monotonic())
    if not _running:
        end()
    if _imports(frame) and time.monotonic() - _came[0] < _PATIENCE:
        signal.setitimer(signal.ITIMER_REAL, _POLL_SECONDS)
        return
    raise KeyboardInterrupt


def _on_unraisable(lost: sys.UnraisableHookArgs) -> None:
    """What `__del__` raises goes no further; the exception is raised again, out of it."""
    if lost.exc_type is KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, _POLL_SECONDS)
    else:
        sys.__unraisablehook__(lost)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTS:
            return True
        frame = frame.f_back
    return False
