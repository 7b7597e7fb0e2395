"""What quantising weights takes, beside copying the bytes and beside other quantisers.

Run by hand, on folders with a `model.onnx` and filled weights:

    python benchmarks/quantize.py FOLDER... [--bits 4] [--group 128] [--tools omforge,copy,ort]
                                  [--python ort=PYTHON ...] [--cold] [--timeout S]
                                  [--memory-limit GIB] [--scratch DIR]

`omforge` clips each group where the squared error is least, `omforge-minmax` does not;
`omforge-numpy` runs without numba and `omforge-cold` compiles its loops first.

`copy` is the floor: the export's weights are read and as many bytes as omforge writes are written,
in pieces of 8 MiB. It runs behind omforge, which tells how many; run it twice, as the disk and
its cache are part of it. Each peer (`ort`, `modelopt`, `olive`, `nncf`) runs in the environment
that `--python` gives for it, on a copy of the export without a Transpose behind the weights. With
`--cold` the weights are read from the disk each time, and not from the system's memory.
"""

import argparse
import os
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
    "error",
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
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--memory-limit", type=float, default=0.9 * available_memory() / GIB)
    parser.add_argument("--scratch", type=Path)
    given = parser.parse_args()
    limits = Limits(given.timeout, int(given.memory_limit * GIB))
    pythons = dict(each.split("=", 1) for each in given.python)
    tools = given.tools.split(",")
    for folder in given.folders:
        with tempfile.TemporaryDirectory(dir=given.scratch, prefix="quantize-") as made:
            scheme = [str(given.bits), str(given.group)]
            runs = Runs(folder, Path(made), limits, pythons, scheme, cold=given.cold)
            rows = [runs.measure(tool) for tool in tools]
        cold = ", from the disk" if given.cold else ""
        _print(folder, rows, f"int{given.bits} g{given.group}{cold}")


class Runs:
    """Of one folder.

    Args:
        folder: The export.
        scratch: Where tools write.
        limits: When a tool is ended.
        pythons: The interpreters of peers.
        scheme: Bits and group.
        cold: Let the system forget the weights ahead of each run.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        limits: Limits,
        pythons: dict[str, str],
        scheme: list[str],
        *,
        cold: bool,
    ) -> None:
        self._folder = folder
        self._scratch = scratch
        self._limits = limits
        self._pythons = pythons
        self._scheme = scheme
        self._cold = cold
        self._size = 0

    def measure(self, tool: str) -> Row:
        """Run a tool, and look at what it wrote."""
        peer = TOOLS[tool].peer
        python = self._pythons.get(peer, sys.executable)
        source = self._plain() if peer else self._folder
        output = self._scratch / "out"
        output.mkdir()
        if self._cold:
            _forget(source)
        told, usage = self._run(python, "quantize_tools.py", tool, output, source, *self._scheme)
        written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        if tool.startswith("omforge"):
            self._size = written
        if usage.status == 0 and tool != "copy":
            where = (self._folder, self._plain() if peer else self._folder, output)
            told |= self._run(sys.executable, "quantize_error.py", *where)[0]
        shutil.rmtree(output)
        print(f"{self._folder.name}: {tool} took {usage.wall:.1f} s", file=sys.stderr)
        return Row(tool, usage, written, told)

    def _plain(self) -> Path:
        made = self._scratch / "plain"
        if not made.exists():
            made.mkdir()
            job = ("quantize_tools.py", "plain", made, self._folder, *self._scheme)
            told, usage = self._run(sys.executable, *job)
            if usage.status:
                raise SystemExit(f"{self._folder} cannot be prepared for peers: {told}")
        return made

    def _run(self, python: str, script: str, *job: object) -> tuple[dict[str, str], Usage]:
        log = self._scratch / "log.txt"
        size = [str(self._size)] if script == "quantize_tools.py" else []
        command = [python, str(Path(__file__).parent / script), *map(str, job), *size]
        usage = run(command, self._limits, log)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if usage.killed:
            return {"remarks": f"killed at {usage.killed}"}, usage
        if usage.status or not lines or not lines[-1].startswith("told"):
            return {"remarks": (lines or ["no message"])[-1][:70]}, usage
        return dict(item.split("=", 1) for item in lines[-1].split()[1:]), usage


def _forget(folder: Path) -> None:
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


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
            row.told.get("error", ""),
            row.told.get("remarks", ""),
        )
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
