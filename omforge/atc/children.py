"""The processes that a build starts: one Ctrl-C ends them all, and so does the end of the build.

`kill -9`, or the kernel short of memory, runs no handler of ours, and Linux's PR_SET_PDEATHSIG is
of no use here: it reaches the child alone and not what that started, and sets it by code that runs
between fork and exec, which a process with threads had better not have. So a guard, a small process
of its own, reads a pipe that only we write. It is told of each process that is started and of each
that is done; where the pipe ends, so have we, and it ends what is left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from omforge.atc.find import Atc

log = logging.getLogger(__name__)

_GRACE_SECONDS = 5.0

# Runs without the site packages, so that it costs some 10 ms; a line is +PID or -PID.
_GUARD = f"""
import os, signal, sys, time
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
def reach(number):
    for group in list(groups):
        try:
            os.killpg(group, number)
        except OSError:
            groups.discard(group)
reach(signal.SIGTERM)
deadline = time.monotonic() + {_GRACE_SECONDS}
while groups and time.monotonic() < deadline:
    time.sleep(0.05)
    reach(0)
reach(signal.SIGKILL)
"""


class Children:
    """The processes that run.

    Each is the head of a process group of its own: atc is a script that starts atc.bin, which
    starts compilers, and all of them have to go.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._guard: subprocess.Popen[bytes] | None = None
        self.stopped = False

    def start(self, words: Sequence[str], cwd: Path, atc: Atc) -> subprocess.Popen[bytes]:
        """Start a process, its stderr going where its stdout goes.

        Raises:
            OSError: It cannot be started.
        """
        with self._lock:
            if self.stopped:
                raise InterruptedError("stopped")
            if self._guard is None:
                self._guard = _start_guard()
            try:
                process = subprocess.Popen(
                    words,
                    cwd=cwd,
                    env=None if atc.environment is None else dict(atc.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError:
                self._release_guard()
                raise
            self._running.add(process)
            self._tell_guard(f"+{process.pid}\n")
        return process

    def done(self, process: subprocess.Popen[bytes]) -> None:
        """Forget a process that has ended."""
        with self._lock:
            self._running.discard(process)
            self._tell_guard(f"-{process.pid}\n")
            self._release_guard()

    def stop(self) -> None:
        """End every process, and start none any more."""
        with self._lock:
            self.stopped = True
            running = list(self._running)
        for process in running:
            signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            # The group may outlive its head.
            signal_group(process, signal.SIGKILL)

    def _tell_guard(self, line: str) -> None:
        if self._guard is None or self._guard.stdin is None:
            return
        try:
            self._guard.stdin.write(line.encode())
            self._guard.stdin.flush()
        except OSError as error:  # somebody ended it
            log.info("no guard of atc's processes: %s", error)

    def _release_guard(self) -> None:
        """End it where nothing runs."""
        if self._running or self._guard is None:
            return
        self._guard.kill()
        self._guard.communicate()  # closes the pipe too
        self._guard = None


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process and to all that it started and that is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _start_guard() -> subprocess.Popen[bytes] | None:
    try:
        return subprocess.Popen(
            (sys.executable, "-I", "-S", "-c", _GUARD),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what ends our group is not to end it
        )
    except OSError as error:  # a Python inside another program has no executable
        log.info("no guard of atc's processes: %s", error)
        return None
