"""Every decoder family of transformers that builds tiny, through the whole of omforge.

Run by hand, with the `export` extra:

    python benchmarks/families.py SCRATCH [--only llama,gemma2] [--export-only | --again]
                                  [--timeout S] [--table docs/families.md]

Each family is built from its config with small sizes and random weights, exported by transformers'
ONNX exporter, compiled for both SoCs (with `--compare-each` for the first) and verified. Each step
is a process of its own with a timeout, so that a hang or a traceback is a row of the table. What
was done is kept under SCRATCH: a run goes on where the last one ended. `--again` keeps the exports
and judges them once more.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import family_exports

SOCS = ("Ascend910B4", "Ascend310P3")
COMPILE = ("--context", "64", "--prefill", "16", "--atc", "none")
EXPORTERS = ("family_exports", "torch", "transformers.exporters")
PRELOADED = (
    "omforge.cli.app",
    "omforge.compilation.compile",
    "omforge.runtime.compare",
    "onnxruntime",
)
ROUNDING = (
    "a tie that rounding decides",
    "a limit that rounding crosses",
    "float16 does not hold this model closer",
)
"""How verify says that float16 is behind a difference: it does not tell two scores of a router
apart, or the weights alone, rounded to it, are beyond the tolerance."""
PACKAGES = ("transformers", "torch", "onnxruntime")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--only", default="", help="families, by comma; all if absent")
    parser.add_argument("--export-only", action="store_true")
    parser.add_argument("--again", action="store_true", help="judge what was judged before, too")
    parser.add_argument("--retry", action="store_true", help="export what failed before, too")
    parser.add_argument("--timeout", type=int, default=300)
    parser.add_argument("--table", type=Path, help="write the table to this file")
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name] or family_exports.families()
    # Forked from one process that has imported everything: that takes longer than the work itself.
    context = multiprocessing.get_context("forkserver")
    exports = any(not (given.scratch / "exports" / n / "export.json").exists() for n in names)
    context.set_forkserver_preload([*PRELOADED, *(EXPORTERS if exports else ())])
    rows: list[Row] = []
    for name in names:
        exported = _exported(context, name, given)
        if given.export_only:
            print(name, exported.get("error") or "exported", flush=True)
            continue
        rows.append(_judged(name, exported, given))
        print(line(rows[-1]), flush=True)
    if rows:
        print(summary(rows))
    if given.table:
        given.table.write_text(document(rows))


Row = Mapping[str, Any]


# --- exporting ------------------------------------------------------------------------------------


def _exported(context: Any, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The facts of an export, made now or before; `error` is there if there is none."""
    folder = given.scratch / "exports" / name
    facts, failed = folder / "export.json", given.scratch / "exports" / f"{name}.failed"
    if facts.exists():
        return json.loads(facts.read_text())
    if failed.exists() and not given.retry:
        return {"error": failed.read_text().strip()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    process = context.Process(target=_export, args=(name, folder, failed))
    process.start()
    process.join(given.timeout)
    if process.is_alive():
        process.kill()
        process.join()
        failed.write_text(f"no end in {given.timeout} s\n")
    if facts.exists():
        return json.loads(facts.read_text())
    if not failed.exists():
        failed.write_text(f"the process ended with {process.exitcode}\n")
    return {"error": failed.read_text().strip()}


def _export(name: str, folder: Path, failed: Path) -> None:
    sys.stdout = sys.stderr = (folder.parent / f"{name}.log").open("w")
    try:
        family_exports.export(name, folder)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        told = str(error).strip().splitlines()
        failed.write_text(f"{type(error).__name__}: {told[0] if told else ''}"[:300] + "\n")


# --- judging --------------------------------------------------------------------------------------


def _judged(name: str, exported: Mapping[str, Any], given: argparse.Namespace) -> Row:
    """A row: what each SoC's compilation and verification gave."""
    if "error" in exported:
        return {"family": name, "exported": False, "reason": exported["error"]}
    kept = given.scratch / "results" / f"{name}.json"
    if kept.exists() and not given.again:
        return json.loads(kept.read_text())
    row: dict[str, Any] = {"family": name, "exported": True, "unlike": _unlike(exported)}
    source, bundle = given.scratch / "exports" / name, given.scratch / "bundles" / name
    bundle.parent.mkdir(parents=True, exist_ok=True)
    for soc in SOCS:
        row[soc] = _judge(source, bundle, soc, given.timeout, compare=soc == SOCS[0])
    shutil.rmtree(bundle, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(row, indent=1) + "\n")
    return row


def _unlike(exported: Mapping[str, Any]) -> str:
    """What the export itself cannot do, or does otherwise than PyTorch."""
    if "unlike" in exported:
        return f"fails with other sizes ({exported['unlike']})"
    if exported["max_abs"] > 1e-3:
        return f"its logits are {exported['max_abs']:.2g} from PyTorch's"
    return ""


def _judge(source: Path, bundle: Path, soc: str, timeout: int, *, compare: bool) -> dict[str, Any]:
    """Compile and verify for one SoC."""
    shutil.rmtree(bundle, ignore_errors=True)
    found: dict[str, Any] = {}
    command = ("compile", str(source), "--target", soc, *COMPILE, "-o", str(bundle), "--json")
    options = ("--compare-each",) if compare else ()
    status, told, words = _omforge((*command, *options), timeout)
    if compare and status and "compare" in words:
        found["alarm"] = words
        status, told, words = _omforge(command, timeout)
    if status and "no KV cache" in words:  # what the program says next
        encode = (*command, "--task", "encode")
        encoded = _omforge((*encode, *options), timeout)
        if encoded[0] == 0:
            command, found["task"] = encode, "encode"
            status, told, words = encoded
    if status and not words.startswith("Traceback"):
        found["refused"] = words
        partly = _omforge((*command, "--allow-partial"), timeout)
        if partly[0] == 0 or partly[2].startswith("Traceback"):
            status, told, words = partly
    if status:
        return found | {"compiled": False, "reason": words}
    coverage = told["coverage"]
    kinds = ("attention", "rotary", "norm", "mlp")
    found |= {
        "compiled": True,
        "raised": bool(coverage["complete"]),
        "coverage": {k: f"{coverage[k]['found']}/{coverage[k]['expected']}" for k in kinds},
        "remark": told.get("remark", ""),
    }
    status, told, words = _omforge(("verify", str(bundle), "--json"), timeout)
    found["verified"] = status == 0
    if cases := told.get("cases", told.get("comparisons")):
        found["of_limit"] = max(case["excess"] for case in cases)
    if status and any(cause in words for cause in ROUNDING):
        # What verify says next: in float32 there is no such rounding.
        whole = (*command, "--dtype", "fp32", *(() if found["raised"] else ("--allow-partial",)))
        steps = (whole, ("verify", str(bundle), "--json"))
        found["float32"] = all(_omforge(step, timeout)[0] == 0 for step in steps)
        found["verified"] = found["float32"]
    return found if status == 0 else found | {"reason": words}


def _omforge(arguments: Sequence[str], timeout: int) -> tuple[int, dict[str, Any], str]:
    """Run a command with `--json`; return its status, its document and what it said in one line."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = context.Process(target=_command, args=(arguments, out, err))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            return -1, {}, f"no end in {timeout} s"
        stdout, stderr = (f.read_text() if f.exists() else "" for f in (out, err))
    status = process.exitcode or 0
    try:
        told = json.loads(stdout)
    except ValueError:
        told = {}
    if "Traceback (most recent call last)" in stderr:
        return status or 1, told, "Traceback: " + " / ".join(stderr.strip().splitlines()[-2:])
    if status == 0:
        return 0, told, ""
    if error := told.get("error"):
        return status, told, ": ".join(_one_line(error[k]) for k in ("what", "why") if error[k])
    if failures := told.get("failures"):
        failure = failures[0]
        told_by = [failure[k] for k in ("what", "why")] if isinstance(failure, dict) else [failure]
        return status, told, ": ".join(map(_one_line, told_by))
    return status, told, _one_line(stderr.strip().partition("\n")[0])


def _command(arguments: Sequence[str], out: Path, err: Path) -> None:
    """`omforge ARGUMENTS`, with its output in two files."""
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["omforge", *arguments]
    from omforge.__main__ import main as omforge_main

    omforge_main()


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- telling --------------------------------------------------------------------------------------


def status(row: Row, what: str) -> str:
    """Whether something is so for both SoCs: yes, no, or the one it is so for."""
    got = [soc for soc in SOCS if row.get(soc, {}).get(what)]
    if len(got) < len(SOCS):
        return " ".join(got) or "no"
    apart = what == "verified" and any(row[soc].get("float32") for soc in SOCS)
    return "in float32" if apart else "yes"


def is_right(row: Row) -> bool:
    """Whether everything was raised and verified, on both SoCs."""
    found = [status(row, what) for what in ("compiled", "raised", "verified")]
    return found[:2] == ["yes", "yes"] and found[2] in ("yes", "in float32")


def reason(row: Row) -> str:
    """Why a row is not right, as the program said it."""
    if not row["exported"]:
        return row["reason"]
    told = [row[soc].get("reason") or row[soc].get("refused", "") for soc in SOCS]
    words = (
        told[0]
        if told[0] == told[1]
        else "; ".join(f"{soc}: {word}" for soc, word in zip(SOCS, told, strict=True) if word)
    )
    if "alarm" in row[SOCS[0]]:
        words = f"{words} --compare-each: {row[SOCS[0]]['alarm']}".strip()
    if row["unlike"]:
        words = f"{words} (the export: {row['unlike']})".strip()
    return words


def line(row: Row) -> str:
    """One line of the table."""
    if not row["exported"]:
        return f"| {row['family']} | no | - | - | - | - | {_cell(reason(row))} |"
    alarm = (
        "alarm" if "alarm" in row[SOCS[0]] else "-" if status(row, "compiled") == "no" else "quiet"
    )
    cells = [status(row, what) for what in ("compiled", "raised", "verified")]
    return f"| {row['family']} | yes | {' | '.join(cells)} | {alarm} | {_cell(reason(row))} |"


def _cell(text: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)  # torch colours what it raises
    return plain.replace("|", "\\|")


def summary(rows: Sequence[Row]) -> str:
    """How many families got how far."""
    exported = [row for row in rows if row["exported"]]
    right = [row for row in exported if is_right(row)]
    wide = [row for row in right if status(row, "verified") == "in float32"]
    tracebacks = [row for row in exported if "Traceback" in reason(row)]
    alarms = [row for row in exported if "alarm" in row[SOCS[0]]]
    share = f" ({len(right) / len(exported):.0%})" if exported else ""
    sound = [row for row in exported if is_right(row) or not _is_unsound(row)]
    of_sound = f", {len(right) / len(sound):.0%} of the {len(sound)} sound exports" if sound else ""
    return (
        f"{len(rows)} families, {len(exported)} exported; {len(right)} of these{share} "
        f"raised completely and verified on {' and '.join(SOCS)}{of_sound}, "
        f"{len(wide)} of them in float32 only; "
        f"{len(tracebacks)} tracebacks; {len(alarms)} false alarms of --compare-each"
    )


_UNSOUND = ("the export: ", "the export does not agree with itself", "and the export has none")


def _is_unsound(row: Row) -> bool:
    """Whether the exporter's graph is wrong, fails at other sizes, or lost a part of the model."""
    return any(text in reason(row) for text in _UNSOUND)


def document(rows: Sequence[Row]) -> str:
    """The table as a page."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    head = (
        "# Decoder families of transformers\n\n"
        "Written by `python benchmarks/families.py SCRATCH --table docs/families.md`:\n"
        f"{len(rows)} of the {len(family_exports.families())} model types of\n"
        "`AutoModelForCausalLM`, built from its config with small sizes and random\n"
        "weights, exported by transformers' ONNX exporter, then\n"
        f"`omforge compile {' '.join(COMPILE)}` and `omforge verify` for {' and '.join(SOCS)}.\n"
        f"With {versions}.\n\n"
    )
    exported = [row for row in rows if row["exported"]]
    columns = (
        "| family | exported | compiled | raised | verified | compare-each | reason |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    body = "\n".join(line(row) for row in exported)
    sound = (
        "A sound export runs on ONNX Runtime at other sizes than its sample's, gives the same in\n"
        "several calls as in one, and has what its config.json promises; what a family's lacks is\n"
        "in its reason. In float32: the float16 bundle fails, verify says that rounding to\n"
        "float16 is behind it (a router's tie, or the weights alone are beyond the tolerance),\n"
        "and the same export compiled with `--dtype fp32` verifies.\n\n"
    )
    left = "\n".join(
        f"| {row['family']} | {_cell(reason(row))} |" for row in rows if not row["exported"]
    )
    return (
        f"{head}{summary(rows)}.\n{sound}{columns}{body}\n\n## Not built or not exported\n\n"
        f"These ended in transformers or in its exporter, before omforge saw anything.\n\n"
        f"| family | what ended it |\n|---|---|\n{left}\n"
    )


if __name__ == "__main__":
    main()
