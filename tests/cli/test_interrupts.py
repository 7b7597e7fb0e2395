"""Ctrl-C is one line and status 130, whatever it comes upon."""

import subprocess
import sys
from pathlib import Path

import pytest

from omforge.cli.interrupts import TOLD

START = """
import atexit, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs ignore it
from omforge.cli import app, entry
from omforge.cli.interrupts import Unwinding

def press():
    os.kill(os.getpid(), signal.SIGINT)

def wait():
    while True:
        pass
"""
IMPORT = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
for _ in range(1000):
    pass
done = True
"""


def run(code: str, folder: Path | None = None) -> tuple[int, str, str]:
    words = [sys.executable, "-c", code, *([] if folder is None else [str(folder)])]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_while_the_program_starts() -> None:
    """Here at the import of its command line, which raises what an extension module would."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'omforge.cli.app':\n"
        "            try: os.kill(os.getpid(), signal.SIGINT)\n"
        "            except KeyboardInterrupt: raise ImportError('initialization failed') from None\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from omforge.cli.entry import main\n"
        "main()\n"
    )
    assert run(code) == (130, "", f"error: {TOLD}\n")


COMMANDS = {
    # typer by itself says nothing, and ends with 130.
    "its options are read": (
        "app.Commands.make_context = lambda *_, **__: (press(), wait())\n    app.app(['passes'])"
    ),
    # Python ends a process by the signal that code of `exec` left by KeyboardInterrupt.
    "code is run by exec": (
        "with Unwinding():\n"
        "        try: exec('press(); wait()', globals())\n"
        "        except KeyboardInterrupt: raise SystemExit(130)"
    ),
    "a library loses the exception": (
        "with Unwinding():\n        try: press(); wait()\n        except KeyboardInterrupt: pass"
    ),
    "something is deleted": (
        "class Dying:\n        def __del__(self): press(); wait()\n"
        "    with Unwinding():\n        Dying(); wait()"
    ),
    "it ends": "atexit.register(press)",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_while(command: str) -> None:
    code = f"{START}\ndef main():\n    {command}\n    sys.exit(0)\napp.main = main\nentry.main()\n"
    assert run(code) == (130, "", f"error: {TOLD}\n")


def test_an_import_is_finished_first_and_then_the_command_unwound(tmp_path: Path) -> None:
    (tmp_path / "interrupted_module.py").write_text(IMPORT)
    command = """
def main():
    sys.path.insert(0, sys.argv[1])
    with Unwinding():
        try:
            import interrupted_module
            wait()
        finally:
            print("taken back", sys.modules["interrupted_module"].done)
app.main = main
entry.main()
"""
    assert run(START + command, tmp_path) == (130, "taken back True\n", f"error: {TOLD}\n")


def test_it_is_said_once() -> None:
    command = """
from omforge.cli import console

def main():
    with Unwinding():
        try:
            press(); wait()
        except KeyboardInterrupt as error:
            sys.exit(console.report(error, as_json=False))
app.main = main
entry.main()
"""
    assert run(START + command) == (130, "", f"error: {TOLD}\n")
