"""What omforge's passes take and find, beside the other tools that rewrite ONNX graphs.

Run by hand, on folders with a `model.onnx` (and the weights that it names):

    python benchmarks/passes.py FOLDER... [--tools omforge,onnxsim] [--peers PYTHON]
    python benchmarks/passes.py FOLDER --layers 6,12,24
    python benchmarks/passes.py FOLDER --tools omforge --profile 10

`README.md` says what is measured and how.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measure import GIB, Limits, Usage, available_memory, run
from pass_tools import GRAPH, REPORT, TOOLS, read_config

LOG = "log.txt"
DEFAULT_TOOLS = [name for name in TOOLS if name != "omforge-copy"]
COLUMNS = (
    "tool",
    "CPU s",
    "passes",
    "wall s",
    "RSS GiB",
    "anon GiB",
    "nodes",
    "attn",
    "norms",
    "rotary",
    "MLP",
    "written",
    "remarks",
)


@dataclass(frozen=True)
class Row:
    """One run of one tool on one model.

    Attributes:
        tool: Its name in `TOOLS`.
        usage: What the operating system says.
        report: What the tool's process told: version, seconds of each phase, how far it came.
        counts: Nodes and blocks of what it wrote; empty if it wrote nothing.
        written: Bytes of the files that it wrote.
        linked: Bytes of the export's files that its graph goes on using.
    """

    tool: str
    usage: Usage
    report: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)
    written: int = 0
    linked: int = 0

    @property
    def remarks(self) -> str:
        """Why there is no result, or what the result shares with the export."""
        at = self.report["at"]
        if self.usage.killed:
            return f"killed at {self.usage.killed}, in: {at}"
        if "missing" in self.report:
            return f"not installed: {self.report['missing']}"
        if "error" in self.report:
            return f"failed in {at}: {self.report['error'].splitlines()[0][:100]}"
        if self.usage.status:
            return f"ended with status {self.usage.status}, in: {at}"
        return f"+{size(self.linked)} linked" if self.linked else ""

    @property
    def ran(self) -> bool:
        """Whether the tool's numbers mean anything."""
        return "missing" not in self.report

    def cells(self) -> list[str]:
        """The row of the table."""
        version = self.report.get("version", "")
        used = self.usage
        numbers = [f"{used.cpu:.1f}", self._passes(), f"{used.wall:.1f}"]
        numbers += [f"{used.peak_rss / GIB:.2f}", f"{used.peak_anonymous / GIB:.2f}"]
        found = [str(self.counts.get(key, "-")) for key in _FOUND]
        written = size(self.written) if self.counts else "-"
        cells = [*(numbers if self.ran else ["-"] * 5), *found, written, self.remarks]
        return [f"{self.tool} {version}".strip(), *cells]

    def _passes(self) -> str:
        passes = self.report["phases"].get("passes")
        return f"{passes['cpu']:.1f}" if passes else "-"


_FOUND = ("nodes", "attention", "norms", "rotary", "mlp")


class Bench:
    """Runs tools, each in a process and an output folder of its own.

    Args:
        peers: The Python that has the other tools.
        limits: When a tool is killed.
        scratch: Where outputs go; on the file system of the exports, because weights are linked.
    """

    def __init__(self, peers: str, limits: Limits, scratch: Path | None) -> None:
        self._peers = peers
        self._limits = limits
        self._scratch = scratch

    def measure(self, tool: str, model: Path, *options: str) -> Row:
        """Run one tool and look at what it left."""
        python = sys.executable if tool.startswith("omforge") else self._peers
        with self._folder() as out:
            command = [python, _child(), tool, str(model), str(out), *options]
            usage = run(command, self._limits, out / LOG)
            report = _report(out, usage)
            made = [file for file in out.rglob("*") if file.name not in (REPORT, LOG)]
            stats = [file.stat() for file in made if file.is_file()]
            return Row(
                tool,
                usage,
                report,
                self.count(out / GRAPH) if _finished(usage, report) else {},
                sum(stat.st_size for stat in stats if stat.st_nlink == 1),
                sum(stat.st_size for stat in stats if stat.st_nlink > 1),
            )

    def count(self, model: Path) -> dict[str, int]:
        """Count what a graph holds, in another process: this one must stay small."""
        with self._folder() as out:
            subprocess.run([sys.executable, _child(), "count", str(model), str(out)], check=True)
            return json.loads((out / REPORT).read_text())["counts"]

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        # Removed at once: while a hard link exists, onnx refuses to load the export itself.
        with tempfile.TemporaryDirectory(prefix="omforge-bench-", dir=self._scratch) as name:
            yield Path(name)


def _child() -> str:
    return str(Path(__file__).with_name("pass_tools.py"))


def _report(out: Path, usage: Usage) -> dict[str, Any]:
    file = out / REPORT
    if file.is_file():
        return json.loads(file.read_text())
    lines = (out / LOG).read_text(errors="replace").splitlines()
    last = lines[-1] if lines else f"status {usage.status}"
    return {"phases": {}, "at": "start", "error": last}


def _finished(usage: Usage, report: dict[str, Any]) -> bool:
    return not usage.killed and not usage.status and not {"missing", "error"} & report.keys()


def size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print cells in columns: the first and last to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    last = len(columns) - 1
    for row in (columns, *rows):
        cells = [
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def print_time(row: Row) -> None:
    """Print where the time of one omforge run went."""
    phases = row.report["phases"]
    print(
        "\nwhere omforge's CPU time goes: "
        + ", ".join(f"{name} {taken['cpu']:.2f} s" for name, taken in phases.items())
    )
    passes = sorted(row.report["passes"], key=lambda entry: -entry["seconds"])
    total = sum(entry["seconds"] for entry in passes) or 1
    lines = [
        [
            entry["name"],
            f"{entry['seconds']:.3f}",
            f"{entry['seconds'] / total:.0%}",
            str(entry["rewrites"]),
            f"{entry['nodes']:+d}",
        ]
        for entry in passes
    ]
    print_table(("pass", "wall s", "share", "rewrites", "nodes"), lines)


def compare(bench: Bench, folder: Path, tools: Sequence[str], profile: int) -> list[Row]:
    """Print the table of one model."""
    model = folder / GRAPH
    before = bench.count(model)
    layers = layers_of(folder)
    weights = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    print(
        f"\n== {folder.name}: {before['nodes']} nodes"
        + (f", {layers} layers" if layers else "")
        + f", {size(weights)} of files"
    )
    rows: list[Row] = []
    for tool in tools:
        if sys.stderr.isatty():
            print(f"\033[K{tool} ...", end="\r", file=sys.stderr, flush=True)
        rows.append(bench.measure(tool, model))
    print_table(COLUMNS, [row.cells() for row in rows])
    own = next((row for row in rows if row.tool.startswith("omforge") and row.counts), None)
    if own is not None:
        print_time(own)
    if own is not None and profile:
        # A run of its own: the profiler slows Python down severalfold.
        print(f"\nprofile of {own.tool}, whose times the profiler multiplies")
        again = bench.measure(own.tool, model, "--profile", str(profile))
        print(again.report.get("profile", again.remarks))
    return rows


def scale(bench: Bench, folder: Path, layers: Sequence[int]) -> list[Row]:
    """Print omforge's time on the first layers of a model."""
    rows = [
        bench.measure("omforge", folder / GRAPH, "--keep-layers", str(count)) for count in layers
    ]
    print(f"\n== {folder.name}: time against layers")
    lines: list[list[str]] = []
    for count, row in zip(layers, rows, strict=True):
        passes = row.report["phases"].get("passes")
        lines.append(
            [
                str(count),
                str(row.report.get("nodes_before", "-")),
                *(str(row.counts.get(key, "-")) for key in _FOUND),
                f"{passes['cpu']:.2f}" if passes else "-",
                f"{1000 * passes['cpu'] / count:.0f}" if passes else "-",
                "" if row.counts else row.remarks,
            ]
        )
    names = ("layers", "nodes before", "after", "attn", "norms", "rotary", "MLP")
    print_table((*names, "passes CPU s", "ms a layer", "remarks"), lines)
    return rows


def layers_of(folder: Path) -> int | None:
    config = read_config(folder)
    return config.get("num_hidden_layers", config.get("n_layer"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="each with a model.onnx")
    parser.add_argument("--tools", default=",".join(DEFAULT_TOOLS), help=f"of: {', '.join(TOOLS)}")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one tool")
    parser.add_argument(
        "--memory-limit",
        type=float,
        default=0.9 * available_memory() / GIB,
        help="GiB of anonymous memory for one tool; 90%% of what is available by default",
    )
    parser.add_argument("--peers", default=sys.executable, help="the Python that has the others")
    parser.add_argument("--layers", help="time omforge on the first 6,12,24 layers instead")
    parser.add_argument("--profile", type=int, default=0, help="top functions of omforge to print")
    parser.add_argument("--scratch", type=Path, help="folder for outputs, on the exports' disk")
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    options = parser.parse_args()
    tools = options.tools.split(",")
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        parser.error(f"no tool {', '.join(unknown)}; there are {', '.join(TOOLS)}")
    if lost := [folder for folder in options.folders if not (folder / GRAPH).is_file()]:
        parser.error(f"no {GRAPH} in {', '.join(map(str, lost))}")
    if shutil.which(options.peers) is None:
        parser.error(f"{options.peers} is no Python")

    limits = Limits(options.timeout, int(options.memory_limit * GIB))
    bench = Bench(options.peers, limits, options.scratch)
    print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}; a tool is killed after "
        f"{limits.timeout:g} s or above {limits.memory / GIB:.1f} GiB of anonymous memory"
    )
    measured: dict[str, list[Row]] = {}
    for folder in options.folders:
        if options.layers:
            layers = [int(count) for count in options.layers.split(",")]
            measured[str(folder)] = scale(bench, folder, layers)
        else:
            measured[str(folder)] = compare(bench, folder, tools, options.profile)
    if options.json:
        plain = {name: [asdict(row) for row in rows] for name, rows in measured.items()}
        options.json.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
