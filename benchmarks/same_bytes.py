"""Compile every fixture and write the SHA-256 of what comes out, to compare two states of the code.

A change that moves code and means to change nothing is run before and after::

    git switch --detach BEFORE && python benchmarks/same_bytes.py before.json
    git switch --detach AFTER  && python benchmarks/same_bytes.py after.json --against before.json

Every export under `tests/fixtures` and the embedded model, for two SoCs, through `omforge compile
--atc sim` with several sets of options. What a compile says and its exit status are hashed, too,
and a bundle's folder is written `OUT` in it. The second command lists what differs; it exits 1 if
anything does.
"""

import argparse
import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.exports import ENCODER_DECODERS, ENCODERS, FIXTURES, export

EXAMPLE = Path(__file__).parent.parent / "examples" / "models" / "docs-llama-onnx"
SOCS = ("Ascend910B4", "Ascend310P3")
SIZES = ["--context", "32", "--prefill", "8", "--atc", "sim", "--no-atc-cache"]
SCRATCH = Path(tempfile.gettempdir()) / "omforge-same-bytes"
"""The same for every run: a manifest says where its export was."""

OPTIONS: dict[str, list[str]] = {
    "plain": [],
    "gears": ["--gears", "--prefill", "4,8"],
    "stacked": ["--layout", "stacked", "--batch", "2", "--dtype", "fp32"],
    "int4": ["--quantize", "int4:g32"],
    "int8": ["--quantize", "int8"],
}
"""Beyond SIZES; all but `plain` on the route that all families have, to save time."""


def main() -> int:
    """Compile, hash, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="The JSON file to write.")
    parser.add_argument("--against", type=Path, help="What another state of the code wrote.")
    parser.add_argument("--only", default="", help="Exports whose name holds this.")
    given = parser.parse_args()
    found: dict[str, str] = {}
    for name, base in exports():
        if given.only in name:
            shutil.rmtree(SCRATCH, ignore_errors=True)  # of a run that was killed
            source = _written(name, base, SCRATCH)
            found |= hashes(name, source, SCRATCH / "bundle")
            shutil.rmtree(SCRATCH)
            print(f"{name}: {len(found)} files", file=sys.stderr, flush=True)
    given.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(found)} files, {len({k.split(':')[0] for k in found})} compiles")
    if given.against is None:
        return 0
    before = json.loads(given.against.read_text(encoding="utf-8"))
    differ = sorted(k for k in {*before, *found} if before.get(k) != found.get(k))
    print("\n".join(differ) if differ else "the same bytes")
    return 1 if differ else 0


def exports() -> list[tuple[str, Path | None]]:
    """`route/family` of each fixture and where it lies; None for the embedded model."""
    found: list[tuple[str, Path | None]] = [("docs-llama", None)]
    for base in (FIXTURES, ENCODERS, ENCODER_DECODERS):
        names = sorted(file.relative_to(base).parent for file in base.glob("*/*/model.onnx"))
        found += [(name.as_posix(), base) for name in names]
    return found


def _written(name: str, base: Path | None, scratch: Path) -> Path:
    """The export where every state of the code finds it: a manifest names the place."""
    if base is None:
        return shutil.copytree(EXAMPLE, scratch / "export")
    route, family = name.split("/")
    return export(route, family, scratch / "export", base).parent


def hashes(name: str, source: Path, bundle: Path) -> dict[str, str]:
    """Hashes of every file of every bundle of `source`, by `name SoC options: file`."""
    found: dict[str, str] = {}
    every = OPTIONS if name.startswith(("optimum/", "docs-llama")) else {"plain": []}
    for soc in SOCS:
        for label, options in every.items():
            out = bundle / soc / label
            words = ["compile", str(source), "--target", soc, "-o", str(out), *SIZES, *options]
            status, said = _run(words)
            said = said.replace(str(out), "OUT").replace(str(source), "SOURCE")
            key = f"{name} {soc} {label}"
            found[f"{key}: exit and error"] = _sha256(f"{status} {said}".encode())
            for file in sorted(p for p in out.rglob("*") if p.is_file()):
                found[f"{key}: {file.relative_to(out)}"] = _sha256(file.read_bytes())
    return found


def _run(words: list[str]) -> tuple[int, str]:
    """Run the command line in this process; its status, and what it says of an error."""
    from typer.testing import CliRunner

    from omforge.cli import app as cli

    app = cli.app if hasattr(cli.app, "registered_commands") else cli.app.app
    with contextlib.redirect_stderr(io.StringIO()):
        result = CliRunner().invoke(app, words)
    return result.exit_code, result.stderr if result.exit_code else ""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
