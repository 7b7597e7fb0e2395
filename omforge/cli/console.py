"""What the command line shows: tables and JSON on stdout; progress, logs and errors on stderr.

Names come from models, manifests and tokenizers that somebody else made. Nothing of them reaches a
terminal that it would take for a command: all text is made `visible` here.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import gc
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from omforge.cli import interrupts

log = logging.getLogger(__name__)

PATIENCE = 2.0  # seconds before a progress bar appears
_UNLIMITED = 1000  # columns, where nobody looks at a window

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE_BLOCK = 4 << 20

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SUCH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)


def end_in_order() -> None:
    """Let SIGTERM and SIGHUP unwind the program as Ctrl-C does: what it began is taken back."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup ignores SIGHUP, and it stays ignored.
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)


def quieten() -> None:
    """Silence what the libraries below say by themselves; for the process's start."""
    # transformers says that PyTorch is missing, and onnxruntime what devices it did not find.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)


def collect_seldom() -> None:
    """Let the garbage collector rest: what a graph is made of lives as long as the command."""
    gc.set_threshold(50_000)
    # The interpreter's last collections walk through all of it: half a second for 2,000 nodes.
    atexit.register(gc.freeze)


def return_large_blocks() -> None:
    """Let freed memory go back to the system at once, where it came in large blocks.

    glibc raises the size from which it does so to that of the largest block freed, and keeps what
    is smaller between what is still used: after some layers of 7B, 0.3 GiB.
    """
    if sys.platform == "linux":
        # Another C library need not have it.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def be_verbose() -> None:
    """Log omforge at INFO, and the libraries' warnings, to stderr."""
    warnings.simplefilter("default")
    logging.captureWarnings(True)
    logging.basicConfig(stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_VisibleLines("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("omforge").setLevel(logging.INFO)


# --- what a terminal would obey -------------------------------------------------------------------

_OBEYED = (
    *(set(range(0x20)) - {ord("\t"), ord("\n")}),
    *range(0x7F, 0xA0),  # C1: some terminals take U+009B for ESC [
    *range(0x202A, 0x202F),  # what turns the direction of text, so that it reads as another
    *range(0x2066, 0x206A),
)
_VISIBLE = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _OBEYED}


def visible(text: str) -> str:
    r"""Return text with its control characters spelled out: ESC is shown as \x1b."""
    return text.translate(_VISIBLE)


class _VisibleLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


# --- stdout ---------------------------------------------------------------------------------------


def show(text: str = "") -> None:
    """Write a line to stdout."""
    stream(f"{text}\n")


def stream(text: str) -> None:
    """Write text to stdout at once."""
    _write(sys.stdout, visible(text))


def show_json(data: object) -> None:
    """Write one JSON document to stdout."""
    show(json.dumps(data, indent=2))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table to stdout, without lines.

    In a terminal, cells are folded to its width; in a pipe a row is a line.

    Args:
        columns: Headings; one that begins with ">" is aligned to the right.
        rows: Cells, shown by `str`; an empty one is None.
    """
    # rich takes a tenth of a second, which `omforge --help` need not wait for.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, highlight=False, width=None if terminal else _UNLIMITED)
    table = Table(box=None, pad_edge=False)
    for name in columns:
        right = name.startswith(">")
        table.add_column(
            Text(name.removeprefix(">")),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=right,
        )
    for row in rows:
        # Text, because a name in brackets would be taken for markup.
        table.add_row(*(Text("" if cell is None else visible(str(cell))) for cell in row))
    with console.capture() as captured:
        console.print(table)
    lines = "\n".join(line.rstrip() for line in captured.get().splitlines())
    _write(sys.stdout, f"{lines}\n")  # rich's own styles are meant for the terminal


# --- stderr ---------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Write a line to stderr."""
    _write(sys.stderr, visible(f"{text}\n"))


class VisibleErrors:
    """stderr, for what is written by others."""

    def write(self, text: str) -> None:
        """Write text to stderr at once."""
        _write(sys.stderr, visible(text))


def _write(to: TextIO, text: str) -> None:
    try:
        to.write(text)
    except UnicodeEncodeError:  # a terminal of another encoding still gets the rest of the text
        encoding = to.encoding or "ascii"
        to.write(text.encode(encoding, "replace").decode(encoding))
    to.flush()


class Progress:
    """A bar on stderr for what takes more than two seconds; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._timer = threading.Timer(PATIENCE, self._bar.start)
        self._timer.daemon = True
        self._step = ""

    def __call__(self, step: str, done: int, total: int) -> None:
        """Show the step, and how many of how many are done."""
        self._step = step
        self._bar.update(self._task, description=_plain(step), completed=done, total=total or None)

    def detail(self, text: str) -> None:
        """Show what the step is about at the moment."""
        self._bar.update(self._task, description=_plain(f"{self._step}: {text}"))

    def start(self) -> None:
        """Let the bar appear when the time has come."""
        self._timer.start()

    def stop(self) -> None:
        """Remove the bar."""
        self._timer.cancel()
        if self._timer.is_alive():
            self._timer.join()
        self._bar.stop()


def _plain(text: str) -> str:
    """Text that neither rich reads as markup nor a terminal as commands."""
    return visible(text).replace("[", "\\[")


@contextlib.contextmanager
def progress() -> Generator[Progress | None]:
    """Show progress for the length of a block; None where nobody would see it."""
    # A log line would be drawn over the bar, and says more.
    if not sys.stderr.isatty() or logging.getLogger("omforge").isEnabledFor(logging.INFO):
        yield None
        return
    bar = Progress()
    bar.start()
    try:
        yield bar
    finally:
        bar.stop()


# --- errors ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """An error as users see it: no traceback, but what, why and what next."""

    what: str
    why: str
    next_step: str
    notes: tuple[str, ...]
    status: int

    def __str__(self) -> str:
        lines = [f"error: {self.what.strip()}"]
        lines += [f"  why:  {_indented(self.why)}"] if self.why else []
        lines += [f"  next: {_indented(self.next_step)}"] if self.next_step else []
        lines += [f"  {_indented(note)}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "error": {
                "what": self.what,
                "why": self.why,
                "next": self.next_step,
                "notes": list(self.notes),
                "exit_status": self.status,
            }
        }


def problem(error: BaseException) -> Problem:
    """Return how to tell users of an error; an unexpected one is a bug, and said to be one."""
    if isinstance(error, KeyboardInterrupt) or interrupts.interrupted():
        return Problem(interrupts.TOLD, "", "", (), interrupts.STATUS)
    from omforge.ir.errors import OmforgeError  # loads onnx-ir, so only once there is an error
    from omforge.rewriting.pass_error import place

    notes = tuple(getattr(error, "__notes__", ()))
    if isinstance(error, OmforgeError):
        return Problem(error.what, error.why, error.next_step, notes, error.exit_status)
    if isinstance(error, MemoryError):
        return Problem("out of memory", str(error), "Close other programs", notes, 1)
    if isinstance(error, OSError):
        return _system_problem(error, notes)
    what = f"{type(error).__name__}: {error}"
    return Problem(
        f"omforge failed with {what}",
        f"that is a fault of omforge, at {place(error)}",
        "Report the command, with what it says under --verbose",
        notes,
        1,
    )


def report(error: BaseException, *, as_json: bool) -> int:
    """Tell of an error; the exit status. How a bug came about is told by --verbose."""
    found = problem(error)
    log.info("how it came about", exc_info=error)
    if as_json:
        show_json(found.to_dict())
    say(str(found))
    if found.status == interrupts.STATUS:
        interrupts.said()
    return found.status


def _system_problem(error: OSError, notes: tuple[str, ...]) -> Problem:
    place = f" {error.filename}" if error.filename else ""
    reason = error.strerror or str(error)
    if error.errno in _NO_SPACE:
        step = "Free some space, or write to another disk"
        return Problem(f"cannot write{place}", reason, step, notes, 1)
    if error.errno in _NO_SUCH:
        return Problem(f"cannot use{place}", reason, "Check the path", notes, 2)
    if error.errno == errno.EROFS:
        step = "Write to a folder that is not mounted read-only"
        return Problem(f"cannot write{place}", reason, step, notes, 1)
    step = "Check the path, and who may use it"
    return Problem(f"the system refused{place or ' a file'}", reason, step, notes, 1)


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n        ")
