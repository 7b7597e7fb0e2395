"""Where the program starts: Ctrl-C is one line and status 130, at whatever moment it comes."""

from __future__ import annotations

import os

from omforge.cli.interrupts import interrupted, note_interrupts


def main() -> None:
    """Run the command line; what the `omforge` script calls."""
    note_interrupts()
    try:
        from omforge.cli.app import main as run  # most of a start: it can be interrupted, too

        run()
    except SystemExit:
        raise  # a command that was interrupted has said so
    except BaseException:  # also what an interrupted import made of it
        if not interrupted():
            raise
        os.write(2, b"error: interrupted\n")
        os._exit(130)  # modules that were half imported cannot be trusted to unwind
