"""What quantising weights takes, beside copying the bytes and beside other quantisers.

Run by hand, on folders with a `model.onnx` and filled weights:

    python benchmarks/quantize.py FOLDER... [--bits 4] [--group 128] [--tools copy,omforge,ort]
                                  [--peers PYTHON] [--timeout S] [--memory-limit GIB]
                                  [--scratch DIR]

`omforge` clips each group where the squared error is least, `omforge-minmax` does not;
`omforge-numpy` runs without numba and `omforge-cold` compiles its loops first.

`copy` is the floor: the export's weights are read and as many bytes as omforge writes are written,
in pieces of 8 MiB. It runs behind omforge, which tells how many; run it twice, as the disk and
its cache are part of it.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measure import GIB, Limits, Usage, available_memory, run
from quantize_tools import TOOLS

COLUMNS = (
    "tool",
    "wall s",
    "of copy",
    "CPU s",
    "RSS GiB",
    "anon GiB",
    "MB out",
    "layers",
    "remarks",
)


@dataclass(frozen=True)
class Row:
    """One run of one tool: usage, bytes written, and what it told on its last line."""

    tool: str
    usage: Usage
    written: int
    told: dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--tools", default="omforge,copy,omforge-minmax,omforge-numpy,ort,copy")
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--memory-limit", type=float, default=0.9 * available_memory() / GIB)
    parser.add_argument("--scratch", type=Path)
    given = parser.parse_args()
    limits = Limits(given.timeout, int(given.memory_limit * GIB))
    for folder in given.folders:
        rows: list[Row] = []
        size = 0
        for tool in given.tools.split(","):
            python = sys.executable if TOOLS[tool].ours else given.peers
            job = [str(folder), str(given.bits), str(given.group), str(size)]
            row = _measure(tool, python, job, limits, given.scratch)
            size = row.written if TOOLS[tool].ours and tool != "copy" else size
            rows.append(row)
            print(f"{folder.name}: {tool} took {row.usage.wall:.1f} s", file=sys.stderr)
        _print(folder, rows, f"int{given.bits} g{given.group}")


def _measure(tool: str, python: str, job: list[str], limits: Limits, scratch: Path | None) -> Row:
    with tempfile.TemporaryDirectory(dir=scratch, prefix="quantize-") as made:
        output = Path(made) / "out"
        output.mkdir()
        log = Path(made) / "log.txt"
        here = Path(__file__).parent / "quantize_tools.py"
        command = [python, str(here), tool, str(output), *job]
        usage = run(command, limits, log)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        told: dict[str, str] = {}
        if usage.status == 0 and lines and lines[-1].startswith("told "):
            told = dict(item.split("=", 1) for item in lines[-1].split()[1:])
        elif not usage.killed:
            told = {"remarks": (lines or ["no message"])[-1][:70]}
        else:
            told = {"remarks": f"killed at {usage.killed}"}
        written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        shutil.rmtree(output)
    return Row(tool, usage, written, told)


def _print(folder: Path, rows: list[Row], scheme: str) -> None:
    floors = [row.usage.wall for row in rows if row.tool == "copy" and row.usage.status == 0]
    floor = sum(floors) / len(floors) if floors else 0.0
    print(f"\n## {folder.name}, {scheme}\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for row in rows:
        usage = row.usage
        cells = (
            row.tool,
            f"{usage.wall:.1f}",
            f"{usage.wall / floor:.2f}" if floor else "",
            f"{usage.cpu:.1f}",
            f"{usage.peak_rss / GIB:.2f}",
            f"{usage.peak_anonymous / GIB:.2f}",
            f"{row.written / 1e6:.0f}",
            row.told.get("layers", ""),
            row.told.get("remarks", ""),
        )
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
