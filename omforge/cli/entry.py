"""Where the program starts: Ctrl-C is one line and status 130, at whatever moment it comes."""

from __future__ import annotations

from omforge.cli import interrupts


def main() -> None:
    """Run the command line; what the `omforge` script calls."""
    interrupts.note_interrupts()
    try:
        from omforge.cli.app import main as run  # most of a start: it can be interrupted, too

        run()
    finally:
        if interrupts.interrupted():
            interrupts.end()
