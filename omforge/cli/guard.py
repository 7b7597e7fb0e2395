"""What every command is wrapped in: deliberate errors are a message and an exit status."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer

from omforge.cli import console


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn deliberate errors, the system's and Ctrl-C into a message and an exit status."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (BrokenPipeError, typer.Exit, typer.Abort):
            raise  # the reader of a pipe went away, which `Commands` ends; or the end was asked for
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(console.report(error, as_json=bool(kwargs.get("as_json")))) from None

    return run
