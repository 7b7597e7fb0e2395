"""Running atc: its output streamed to a file, its result judged, its end forced when asked."""

from __future__ import annotations

import codecs
import logging
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omforge.atc.children import Children, signal_group
from omforge.atc.command import check_path
from omforge.atc.errors import codes_of
from omforge.atc.find import DEFAULT_HOMES, HOME_VARIABLES, Atc, at_path, find_atc
from omforge.ir.errors import InputError
from omforge.ir.weights import writing

log = logging.getLogger(__name__)

SUCCESS = "ATC run success"

# A plugin that loses an input logs this and the run still succeeds (seen with
# NPUIncreFlashAttention).
_SILENT_FAILURE = "E18888"

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class AtcResult:
    """What a run of atc gave.

    Attributes:
        ok: It exited with 0, said so, and did not log that it lost an input.
        exit_status: Of the process.
        codes: Error and warning codes in order of first appearance, with the line they stood in.
        om: The file that was made, if any: `<output>.om` or `<output>_<os>_<arch>.om`.
        log: The file that holds all that atc wrote.
        seconds: How long it took.
        lines: What it wrote.
    """

    ok: bool
    exit_status: int
    codes: Mapping[str, str]
    om: Path | None
    log: Path
    seconds: float
    lines: tuple[str, ...] = ()

    def ending(self) -> str:
        """Say how the run ended, for one that names no error."""
        if self.exit_status < 0:
            how = f"it was ended by signal {-self.exit_status}"
        elif self.exit_status:
            how = f"it ended with status {self.exit_status}"
        elif any(SUCCESS in line for line in self.lines):
            how = "it said that it succeeded"
        else:
            how = f"it ended with status 0 and did not say {SUCCESS!r}"
        how += "" if self.om is not None else ", and made no .om"
        said = [line.strip() for line in self.lines if line.strip()]
        return f"{how}; its last line: {said[-1]}" if said else f"{how}; it wrote nothing"


def run_atc(
    command: Sequence[str],
    cwd: Path,
    log_file: Path,
    *,
    program: Atc | Path | None = None,
    on_line: Callable[[str], None] | None = None,
    children: Children | None = None,
) -> AtcResult:
    """Run an atc command, its output going to a file line by line.

    A failed compilation is a result, not an exception.

    Args:
        command: As `atc_command` returns it.
        cwd: What the paths of the command are relative to.
        log_file: Receives all that atc writes.
        program: The atc to run; found by `find_atc` if None.
        on_line: Is called with each line as it comes.
        children: Keeps the process while it runs.

    Raises:
        InputError: There is no atc, it cannot be started, or `cwd` has a path that atc refuses.
    """
    # atc checks the real path, so a folder with a space fails whatever the command says.
    check_path("working folder", str(cwd.resolve()))
    atc = _program(program)
    children = children or Children()
    log.info("%s", shlex.join(command))
    started, clock = time.time(), time.monotonic()
    lines: list[str] = []
    with writing(log_file):
        log_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        process = children.start([*atc.words, *command[1:]], cwd, atc)
    except OSError as error:
        raise InputError(
            f"cannot run {atc.words[0]}",
            error.strerror or str(error),
            "Name CANN's bin/atc for this machine, or simulate with --atc sim",
        ) from error
    try:
        with writing(log_file), log_file.open("w", encoding="utf-8") as sink:
            for line in _lines(process):
                sink.write(f"{line}\n")
                sink.flush()
                lines.append(line)
                if on_line is not None:
                    on_line(line)
        status = process.wait()
    finally:
        # What it started may outlive it, and whatever ended the reading, nothing may stay.
        signal_group(process, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        children.done(process)
    codes = codes_of(lines)
    said_so = any(SUCCESS in line for line in lines)
    return AtcResult(
        ok=status == 0 and said_so and _SILENT_FAILURE not in codes,
        exit_status=status,
        codes=codes,
        om=_om_of(command, cwd, started),
        log=log_file,
        seconds=time.monotonic() - clock,
        lines=tuple(lines),
    )


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield what a process writes, line by line, until it has ended.

    Its end is waited for, and not that of the pipe: a process that it leaves behind (a server of
    compiled kernels) may hold that for ever.
    """
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    ended = closed = False
    while not closed:
        # What was written before the end is in the pipe when the end is seen.
        ended = process.poll() is not None
        if not poll.poll(0 if ended else _POLL_SECONDS * 1000):
            if ended:
                break
            continue
        chunk = os.read(pipe, 1 << 16)
        closed = not chunk
        *whole, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from (line.removesuffix("\r") for line in whole)
    rest += decoder.decode(b"", final=True)
    if rest:
        yield rest


def _program(program: Atc | Path | None) -> Atc:
    if isinstance(program, Atc):
        return program
    path = program or find_atc()
    if path is None:
        places = ", ".join((*HOME_VARIABLES, *DEFAULT_HOMES))
        raise InputError(
            "atc was not found",
            f"it is neither on the PATH nor below {places}",
            "Install CANN and source its set_env.sh, or run the bundle's compile.sh elsewhere",
        )
    return at_path(path)


def _om_of(command: Sequence[str], cwd: Path, started_at: float) -> Path | None:
    """The .om that this run wrote; one that was there before is not a result."""
    prefix = "--output="
    output = next((item[len(prefix) :] for item in command if item.startswith(prefix)), "")
    stem = cwd / output
    # A second of slack: file systems keep coarser times than clocks do.
    made = [
        path
        for path in (Path(f"{stem}.om"), *sorted(stem.parent.glob(f"{stem.name}_*_*.om")))
        if path.is_file() and path.stat().st_mtime >= started_at - 1
    ]
    return made[0] if made else None
