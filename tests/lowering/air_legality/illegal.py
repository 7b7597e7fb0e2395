"""Deliberately illegal GE graphs: a legal one, what is done to it, and the rule that says so.

`python -m tests.lowering.air_legality.illegal` prints them as a table.
"""

import sys
import tempfile
from pathlib import Path

from tests.lowering.air_legality.illegal_limits import LIMITS
from tests.lowering.air_legality.illegal_parts import Illegal
from tests.lowering.air_legality.illegal_structure import STRUCTURE

__all__ = ["ILLEGAL", "Illegal"]

ILLEGAL: tuple[Illegal, ...] = (*STRUCTURE, *LIMITS)


def table() -> str:
    """Every graph with what is said of it, as Markdown."""
    lines = [
        "| rule | graph | SoC | what is done to it | what is said | atc |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "weights.bin").write_bytes(bytes(8192))
        for case in ILLEGAL:
            found = case.offences(Path(folder))
            told = found[0]
            cells = (
                f"`{case.rule}`",
                case.legal,
                case.soc,
                case.how,
                f"{told.where}: {told.what}",
                told.atc or "silent",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
