"""How the command line ends: on wrong usage, and when the reader of its output goes away."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup

from omforge.cli import console
from omforge.cli.interrupts import Unwinding

PIPE_CLOSED = 141
"""Of a process that SIGPIPE ended, 128 + 13: what a shell expects of `omforge passes | head -1`."""


class _ReaderGone(Exception):
    pass


class Commands(TyperGroup):
    """Typer's group, which by itself tells of wrong usage as text only, and ends a pipe with 1."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Read the options; some of them write, as --version does."""
        try:
            return super().make_context(*args, **extra)
        except BrokenPipeError as error:
            raise _ReaderGone from error

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with Unwinding():
                return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderGone from error  # typer would end the process with 1

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; exits unless it is one of another program's (standalone_mode)."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        words = list(sys.argv[1:] if args is None else args)
        try:
            status = super().main(
                words, prog_name, complete_var, False, windows_expand_args, **extra
            )
            sys.stdout.flush()
        except (_ReaderGone, BrokenPipeError):
            status = _without_reader()
        except Exception as error:
            # typer brings a click of its own along, so its errors are known by what they can do.
            if not hasattr(error, "format_message"):
                raise
            status = _wrong_usage(error, as_json="--json" in words)
        sys.exit(status if isinstance(status, int) else 0)


def _without_reader() -> int:
    # What is left in the buffers would raise again at exit.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    return PIPE_CLOSED


def _wrong_usage(error: Any, *, as_json: bool) -> int:
    """Tell of an option or a command that is none; the exit status."""
    text = io.StringIO()
    error.show(text)
    if as_json:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "omforge"
        step = f"`{command} --help` lists what there is"
        found = console.Problem(error.format_message(), "", step, (), error.exit_code)
        console.show_json(found.to_dict())
    console.say(text.getvalue().rstrip())
    return int(error.exit_code)
