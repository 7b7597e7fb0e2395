"""What quantising costs a trained model, beside other quantisers: perplexity on a text.

Run by hand, on a folder with `model.onnx` and `tokenizer.json`:

    python benchmarks/quantize_quality.py FOLDER [--bits 4] [--group 32] [--symmetric] [--head]
        [--shuffle] [--every 1] [--tools omforge:rtn,ort:hqq,...] [--peers PYTHON]
        [--modelopt PYTHON] [--calibration TEXT] [--test TEXT] [--tokens 256]
        [--pieces 16] [--test-pieces 8] [--timeout S] [--memory-limit GIB] [--scratch DIR]
        [--rows FILE]

All tools read the same calibration text, quantise the same matrices to the same bits and groups,
and their graphs are run by the same evaluator. `--rows` keeps what was measured: a run that is
there for the same options is not repeated.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from measure import GIB, Limits, Usage, available_memory, run
from quality_tools import TOOLS

TEXTS = Path(__file__).parents[1] / "examples" / "texts"
BEST = (
    "export:float,omforge:rtn,omforge:hqq,omforge:awq,omforge:gptq,"
    "ort:rtn,ort:hqq,ort:gptq,ort:k_quant,"
    "modelopt:awq_clip,modelopt:awq_lite"
)
COLUMNS = (
    "tool",
    "method",
    "perplexity",
    "above float",
    "mean KL",
    "layers",
    "CPU s",
    "wall s",
    "anon GiB",
    "MB out",
    "remarks",
)


@dataclass(frozen=True)
class Row:
    """One tool's run; `key` says with which options."""

    key: str
    tool: str
    method: str
    cpu: float
    wall: float
    anonymous: int
    written: int
    layers: str
    perplexity: float | None
    divergence: float | None
    remarks: str


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--head", action="store_true", help="quantise a tied head too, untied")
    parser.add_argument("--shuffle", action="store_true", help="another order of channels")
    parser.add_argument("--every", type=int, default=1, help="of so many matrices quantise one")
    parser.add_argument("--tools", default=BEST)
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--modelopt", default=sys.executable)
    parser.add_argument("--calibration", type=Path, default=TEXTS / "python_docs_calibration.txt")
    parser.add_argument("--test", type=Path, default=TEXTS / "python_docs_test.txt")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pieces", type=int, default=16)
    parser.add_argument("--test-pieces", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=1800)
    parser.add_argument("--memory-limit", type=float, default=0.9 * available_memory() / GIB)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--rows", type=Path)
    given = parser.parse_args()
    known = _read(given.rows)
    common = (
        f"{given.folder.resolve().name} {given.tokens} {given.pieces} {given.test_pieces} "
        f"head={given.head} shuffle={given.shuffle} every={given.every}"
    )
    scheme = f"int{given.bits} g{given.group} {'sym' if given.symmetric else 'asym'}"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=given.scratch, prefix="quality-") as made:
        bench = _Bench(given, Path(made))
        for name in given.tools.split(","):
            tool, _, method = name.partition(":")
            key = f"{common} {'' if tool == 'export' else scheme}"
            row = next((r for r in known if (r.key, r.tool, r.method) == (key, tool, method)), None)
            if row is None:
                row = bench.measure(key, tool, method)
                known.append(row)
                if given.rows:
                    text = "\n".join(json.dumps(dataclasses.asdict(each)) for each in known)
                    given.rows.write_text(text + "\n")
            print(f"{name}: {row.perplexity} {row.remarks}", file=sys.stderr, flush=True)
            rows.append(row)
    what = "all layers" if given.head else "all layers but a tied head"
    what = f"each {given.every}th matrix" if given.every > 1 else what
    what += ", channels shuffled" if given.shuffle else ""
    _print(f"{given.folder.resolve().name}, {scheme}, {what}", rows)


def _read(file: Path | None) -> list[Row]:
    if file is None or not file.exists():
        return []
    return [Row(**json.loads(line)) for line in file.read_text().splitlines()]


class _Bench:
    """Runs jobs in processes of their own; the texts are prepared when the first one needs them."""

    def __init__(self, given: argparse.Namespace, made: Path) -> None:
        self._given = given
        self._work = made / "work"
        self._out = made / "out"
        self._log = made / "log.txt"
        self._limits = Limits(given.timeout, int(given.memory_limit * GIB))

    def measure(self, key: str, tool: str, method: str) -> Row:
        """Quantise with one tool, and evaluate what it wrote."""
        given = self._given
        if not self._work.exists():
            self._prepare()
        shutil.rmtree(self._out, ignore_errors=True)
        self._out.mkdir()
        pythons = {"omforge": sys.executable, "peers": given.peers, "modelopt": given.modelopt}
        job = [self._out, given.bits, given.group, given.symmetric, method]
        usage, told = self._run(pythons[TOOLS[tool].environment], tool, self._work, *job)
        remarks, layers = told.get("remarks", ""), told.get("layers", "")
        perplexity, divergence = None, None
        if usage.status == 0:
            _, told = self._run(sys.executable, "evaluate", self._work, self._out)
            remarks = told.get("remarks", remarks)
            if "perplexity" in told:
                perplexity, divergence = float(told["perplexity"]), float(told["divergence"])
        files = [file for file in self._out.rglob("*") if file.is_file()]
        written = sum(file.stat().st_size for file in files)
        usages = (usage.cpu, usage.wall, usage.peak_anonymous, written)
        return Row(key, tool, method, *usages, layers, perplexity, divergence, remarks)

    def _prepare(self) -> None:
        given = self._given
        self._work.mkdir()
        sizes = [given.tokens, given.pieces, given.test_pieces, given.head]
        sizes += [given.shuffle, given.every]
        texts = [given.folder, given.calibration, given.test]
        usage, told = self._run(sys.executable, "prepare", self._work, *texts, *sizes)
        if usage.status:
            sys.exit(f"cannot prepare the texts: {told.get('remarks')}")

    def _run(self, python: str, job: str, *given: object) -> tuple[Usage, dict[str, str]]:
        """Run a job; its usage, and what its last line tells, or the line that says why not."""
        here = Path(__file__).parent / "quality_tools.py"
        command = [python, str(here), job, *map(str, given)]
        usage = run(command, self._limits, self._log)
        text = self._log.read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        if usage.killed:
            return usage, {"remarks": f"killed at {usage.killed}"}
        if usage.status == 0 and lines and lines[-1].startswith("told "):
            return usage, dict(item.split("=", 1) for item in lines[-1].split()[1:])
        last = (lines or [f"ended by {usage.status}"])[-1]
        return usage, {"remarks": last.rpartition("] : ")[2][:160]}


def _print(title: str, rows: list[Row]) -> None:
    print(f"\n## {title}\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    floats = [row.perplexity for row in rows if row.tool == "export" and row.perplexity]
    for row in rows:
        found, above = row.perplexity, ""
        if found and floats and row.tool != "export":
            above = f"{found / floats[0] - 1:+.1%}"
        cells = (
            row.tool,
            row.method,
            f"{found:.3f}" if found else "-",
            above,
            "" if row.divergence is None else f"{row.divergence:.4f}",
            row.layers,
            f"{row.cpu:.0f}",
            f"{row.wall:.0f}",
            f"{row.anonymous / GIB:.2f}",
            f"{row.written / 1e6:.0f}" if found else "-",
            row.remarks.replace("|", "/"),
        )
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
