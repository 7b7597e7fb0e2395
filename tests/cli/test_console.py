"""What the terminal shows, and what a pipe gets instead."""

import errno
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from omforge.cli import console, interrupts
from omforge.ir.errors import CheckError, InputError


class Terminal(io.StringIO):
    """A stream that somebody looks at."""

    def isatty(self) -> bool:
        return True


def test_a_table_in_a_pipe_is_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_table(("name", ">count"), [("a" * 150, 1), ("[bold]b[/bold]", 20), (None, 3)])
    assert capsys.readouterr().out == (
        f"{'name':150}  count\n{'a' * 150}      1\n{'[bold]b[/bold]':150}     20\n{'':150}      3\n"
    )


def test_a_table_in_a_terminal_is_folded_to_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    console.show_table(("name", ">count"), [("word " * 20, 12345)])
    lines = re.sub("\x1b.*?m", "", screen.getvalue()).splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 40
    assert sum("12345" in line for line in lines) == 1


def test_text_that_the_terminal_cannot_show_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.stream("caf\u00e9 \u4e2d")
    assert raw.getvalue() == b"caf? ?"


HOSTILE = "a\x1b[2J\x9b5m\r\x08\u202eb\x7f"
SHOWN = r"a\x1b[2J\x9b5m\x0d\x08\u202eb\x7f"


def test_control_characters_are_spelled_out_everywhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.show(HOSTILE)
    console.stream(f"{HOSTILE}\n")
    console.show_table(("name",), [(HOSTILE,)])
    console.say(HOSTILE)
    console.VisibleErrors().write(HOSTILE)
    out, err = capsys.readouterr()
    assert out.splitlines() == [SHOWN, SHOWN, "name", SHOWN]
    assert err == f"{SHOWN}\n{SHOWN}"
    console.report(InputError(f"node {HOSTILE}", HOSTILE, HOSTILE), as_json=True)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    record = logging.LogRecord("n", logging.INFO, "p", 1, "node %s", (HOSTILE,), None)
    assert console._VisibleLines("%(message)s").format(record) == f"node {SHOWN}"
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    with console.progress() as bar:
        assert bar is not None
        bar(HOSTILE, 1, 4)
        bar.detail(HOSTILE)
        time.sleep(0.3)
    assert "\x1b[2J" not in screen.getvalue()


def test_lines_and_tabs_stay() -> None:
    assert console.visible("a\tb\nc \u4e2d") == "a\tb\nc \u4e2d"


def test_there_is_no_progress_in_a_pipe() -> None:
    with console.progress() as bar:
        assert bar is None


def test_progress_appears_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress() as bar:
        assert bar is not None
        bar("raise", 1, 4)
    assert screen.getvalue().strip() == ""

    monkeypatch.setattr(console, "PATIENCE", 0.01)
    with console.progress() as bar:
        assert bar is not None
        bar("raise", 1, 4)
        bar.detail("fuse-[x]")
        deadline = time.monotonic() + 10
        while "fuse-[x]" not in screen.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "raise: fuse-[x]" in screen.getvalue()


def test_an_error_says_what_why_and_next() -> None:
    error = CheckError("a failed", "b is 2 and c is\n3", "Do d")
    error.add_note("in pass 4, e")
    found = console.problem(error)
    assert str(found) == (
        "error: a failed\n  why:  b is 2 and c is\n        3\n  next: Do d\n  in pass 4, e"
    )
    assert found is not None
    assert found.to_dict() == {
        "error": {
            "what": "a failed",
            "why": "b is 2 and c is\n3",
            "next": "Do d",
            "notes": ["in pass 4, e"],
            "exit_status": 1,
        }
    }


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (InputError("x"), 2, "error: x"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "w.bin"), 1, "cannot write w.bin"),
        (PermissionError(errno.EACCES, "Permission denied", "d"), 2, "cannot use d"),
        (OSError(errno.EIO, "Input/output error"), 1, "the system refused a file"),
        (KeyboardInterrupt(), 130, f"error: {interrupts.TOLD}"),
        (MemoryError(), 1, "error: out of memory"),
    ],
    ids=repr,
)
def test_exit_status(
    error: BaseException, status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.report(error, as_json=False) == status
    assert text in capsys.readouterr().err


def test_a_bug_is_not_told_as_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="bug") as caught:
        raise ValueError("a \x1b[1mbug")
    caught.value.add_note("in pass 1 of 2, fuse-gelu")
    assert console.report(caught.value, as_json=True) == 1
    out, err = capsys.readouterr()
    what, why, *more = err.splitlines()
    assert what == r"error: omforge failed with ValueError: a \x1b[1mbug"
    assert why.startswith("  why:  that is a fault of omforge, at ")
    assert "test_console.py:" in why
    assert more == [
        "  next: Report the command, with what it says under --verbose",
        "  in pass 1 of 2, fuse-gelu",
    ]
    assert json.loads(out)["error"]["notes"] == ["in pass 1 of 2, fuse-gelu"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_large_blocks_go_back_where_the_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Glibc:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            asked.append((parameter, value))
            return 1

    monkeypatch.setattr("ctypes.CDLL", lambda _: Glibc())
    console.return_large_blocks()
    assert asked == [(-3, 4 << 20)]
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())  # a library without it
    console.return_large_blocks()
    assert len(asked) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_program_takes_back_what_it_began(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = (
        "import pathlib, sys, time; from omforge.cli import console; from omforge.ir import folders\n"
        "console.end_in_order()\n"
        "with folders.MadeFolder(pathlib.Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "b")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"in\n"
        assert list(tmp_path.iterdir())
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ImportError("initialization failed")])
def test_after_ctrl_c_every_error_is_the_interruption(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is imported when it comes makes an error of its own of it."""
    assert console.problem(ImportError("initialization failed")).status == 1
    monkeypatch.setattr(interrupts, "_came", [2.0])
    found = console.problem(error)
    assert (found.what, found.status) == (interrupts.TOLD, 130)
