"""Which paths atc takes. Source: hicann/ge:base/common/util.cc."""

from __future__ import annotations

import os
from pathlib import Path

from omforge.atc.sim.reports import Refused, Report

LIMIT = 4096

CHARACTERS = "The path can only contain 'a-z' 'A-Z' '0-9' '-' '.' '_' and Chinese characters."


def valid(path: str) -> bool:
    """Say whether a path holds only ASCII letters, digits, `_-./` and CJK ideographs."""
    return all(
        ("\u4e00" <= c <= "\u9fa5") or (c.isascii() and (c.isalnum() or c in "./_-")) for c in path
    )


def check_input(path: str, flag: str, report: Report) -> None:
    """Refuse an input file that is absent, unreadable, or whose *real* path has other characters.

    Raises:
        Refused: It is one of these.
    """
    if not path:
        report.error("E10004", parameter=flag.lstrip("-"))
        raise Refused
    if not os.path.exists(path):
        reason = "[Errno 2] No such file or directory"
        report.error("E10001", parameter=flag, value=path, reason=reason)
        raise Refused
    if not valid(os.path.realpath(path)):
        report.error("E10001", parameter=flag, value=path, reason=CHARACTERS)
        raise Refused
    if not os.access(path, os.R_OK):
        reason = "[Errno 13] Permission denied"
        report.error("E10001", parameter=flag, value=path, reason=reason)
        raise Refused


def check_output(path: str, flag: str, report: Report) -> None:
    """Refuse a path that cannot be written to; folders on the way are made.

    Raises:
        Refused: It cannot.
    """
    if not path:
        report.error("E10004", parameter=flag)
        raise Refused
    if len(path) >= LIMIT:
        reason = f"Path length is too long. It must be less than {LIMIT}."
        report.error("E10001", parameter=flag, value=path, reason=reason)
        raise Refused
    if not valid(path):
        report.error("E10001", parameter=flag, value=path, reason=CHARACTERS)
        raise Refused
    if os.path.exists(path):
        if not os.access(path, os.W_OK):
            reason = "[Errno 13] Permission denied"
            report.error("E10001", parameter=flag, value=path, reason=reason)
            raise Refused
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        report.error("E10001", parameter=flag, value=path, reason=reason)
        raise Refused from error
