"""Run a command and let the operating system say what it took.

CPU time, wall time and peak resident memory are those of the finished process (`wait4`), so a tool
cannot be measured without its imports or its start. Anonymous memory has no such counter: it is
sampled. Mapped files are resident but not anonymous; the kernel takes their pages back when it
needs them, so they are no cost.

Only the standard library is imported here. A child's peak resident memory starts from its parent's
at the time of the fork, so the parent has to stay small.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
INTERVAL = 0.01  # seconds; at 2 GB/s an allocation can outrun the limit by 20 MB


@dataclass(frozen=True)
class Limits:
    """When a process is killed: after `timeout` seconds, or above `memory` anonymous bytes."""

    timeout: float
    memory: int


@dataclass(frozen=True)
class Usage:
    """What a process took, its waited-for children included.

    Attributes:
        cpu: User and system seconds.
        wall: Seconds from start to end.
        peak_rss: Largest resident set of one process, in bytes; pages of mapped files count.
        peak_anonymous: Largest sampled sum of anonymous memory, in bytes.
        status: Exit status; negative is the number of the signal that ended it.
        killed: Why we ended it ("180 s", "8 GiB"), empty if we did not.
    """

    cpu: float
    wall: float
    peak_rss: int
    peak_anonymous: int
    status: int
    killed: str


def run(command: Sequence[str], limits: Limits, log: Path) -> Usage:
    """Run `command` to its end or to a limit; what it prints goes to `log`."""
    peak, killed = 0, ""
    with log.open("wb") as output:
        start = time.monotonic()
        # Its own session, so that the whole group can be killed and nobody else is.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                pid, status, taken = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                now = sum(anonymous(each) for each in family(process.pid))
                peak = max(peak, now)
                if not killed:
                    killed = _over(limits, now, time.monotonic() - start)
                    if killed:
                        os.killpg(process.pid, signal.SIGKILL)
                time.sleep(INTERVAL)
        except BaseException:  # Ctrl-C must not leave a tool running that takes all memory
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        wall = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would wait for it again
    # Linux counts ru_maxrss in KiB.
    cpu, rss = taken.ru_utime + taken.ru_stime, taken.ru_maxrss << 10
    return Usage(cpu, wall, rss, peak, process.returncode, killed)


def _over(limits: Limits, memory: int, seconds: float) -> str:
    if memory > limits.memory:
        return f"{limits.memory / GIB:g} GiB"
    if seconds > limits.timeout:
        return f"{limits.timeout:g} s"
    return ""


def family(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    # A child is listed under the thread that started it.
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family(int(child))


def anonymous(pid: int) -> int:
    """Return a process's anonymous resident bytes; 0 once it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


def available_memory() -> int:
    """Return the bytes that can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/meminfo has no MemAvailable")
