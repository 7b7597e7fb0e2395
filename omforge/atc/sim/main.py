"""The simulated atc as a program and as a function: `run(argv)` does what `atc argv` does.

Source of the order: hicann/ge:api/atc/main_impl.cc (main_impl).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from omforge.atc.sim import checks, emit, inference, paths
from omforge.atc.sim.air import compile_air
from omforge.atc.sim.command_line import Arguments, Helped, parse, usage
from omforge.atc.sim.parser import parse_model
from omforge.atc.sim.reports import Refused, Report
from omforge.atc.sim.shapes import Shapes, check_gears

START = "ATC start working now, please wait for a moment."
SUCCESS = "ATC run success, welcome to the next use."
FAILURE = "ATC run failed, Please check the detail log, Try 'atc --help' for more information"
FAILED = 255
"""atc returns -1, of which a shell sees 255."""


@dataclass(frozen=True)
class AtcSimResult:
    """What a run gave.

    Attributes:
        exit_status: 0 or 255.
        text: What it wrote to stdout and stderr.
        codes: Every error and warning code once, errors first, in the order found. (atc prints
            the first one's code and of the others the texts only.)
        stdout: The first of the two streams alone.
        stderr: The other one.
    """

    exit_status: int
    text: str
    codes: tuple[str, ...]
    stdout: str
    stderr: str


def run(argv: Sequence[str]) -> AtcSimResult:
    """Run the simulated atc.

    Args:
        argv: The words behind the program's name; paths are relative to the working folder.
    """
    report, out, err = Report(), [START], list[str]()
    try:
        arguments = parse(argv, report, err)
    except Helped:
        return _result(0, [*out, usage()], err, report)
    except Refused:
        return _result(FAILED, [*out, FAILURE, report.error_text()], err, report)
    try:
        _run_mode(arguments, report, out)
        failed = bool(report.errors)
    except Refused:
        failed = True
    except OSError as error:  # a full disk, a folder that cannot be written
        report.inner(f"{error.strerror or error}: {error.filename or arguments['output']}")
        failed = True
    out.append("...")
    if failed:
        return _result(FAILED, [*out, FAILURE, report.error_text()], err, report)
    return _result(0, [*out, SUCCESS, report.warning_text()], err, report)


def _result(status: int, out: list[str], err: list[str], report: Report) -> AtcSimResult:
    stdout = "\n".join(out) + "\n"
    stderr = "".join(f"{line}\n" for line in err)
    return AtcSimResult(status, stdout + stderr, report.codes, stdout, stderr)


def _run_mode(arguments: Arguments, report: Report, out: list[str]) -> None:
    checks.load_raw_options(arguments, report)
    checks.check_global(arguments, report)
    if arguments["singleop"]:
        _not_simulated("--singleop", report)
    checks.check_framework(arguments, report)
    mode = arguments.number("mode")
    if mode in (checks.GENERATE, checks.PRE_CHECK):
        _compile(arguments, report, out)
    elif mode == checks.TO_JSON:
        _check_json(arguments, report)
        emit.to_json(arguments, report)
    elif mode == checks.DISPLAY:
        _check_display(arguments, report)
        out += emit.display(arguments, report)
    else:
        _not_simulated(f"--mode={mode}", report)


def _compile(arguments: Arguments, report: Report, out: list[str]) -> None:
    shapes = checks.check_flags(arguments, report)
    checks.check_environment(arguments, report)
    framework, mode = arguments["framework"], arguments.number("mode")
    if framework == str(checks.MINDSPORE) and mode == checks.GENERATE:
        compile_air(arguments, shapes, report)
    elif framework == str(checks.ONNX):
        if not _compile_onnx(arguments, shapes, report):
            return
    else:
        _not_simulated(f"--framework={framework} with --mode={mode}", report)
    if arguments["display_model_info"] == "1":
        arguments.values["om"] = arguments["output"] + ".om"
        out += emit.display(arguments, report)


def _compile_onnx(arguments: Arguments, shapes: Shapes, report: Report) -> bool:
    """Say whether there is an .om now: none of --mode=3."""
    parsed = parse_model(arguments, shapes, report)
    if parsed is None:
        return False
    emit.check_build(parsed, arguments, shapes, report)
    inference.check_inference(Path(arguments["model"]), report)
    checks.check_output_type(arguments, report)
    check_gears(shapes, report)
    if report.errors:  # silent failures, which stop the run here
        raise Refused
    emit.write_model(parsed, arguments, shapes, report)
    return True


def _check_json(arguments: Arguments, report: Report) -> None:
    """main_impl.cc:CheckConverJsonParamFlags: all faults, not the first."""
    failed = False
    for name, check in (("om", paths.check_input), ("json", paths.check_output)):
        if not arguments[name]:
            report.error("E10004", parameter=name)
            failed = True
            continue
        try:
            check(arguments[name], f"--{name}", report)
        except Refused:
            failed = True
    if failed:
        raise Refused


def _check_display(arguments: Arguments, report: Report) -> None:
    paths.check_input(arguments["om"], "--om", report)
    if arguments["framework"] != "-1":
        report.error("E10057", parameter0="om", parameter1="mode")
        raise Refused


def _not_simulated(what: str, report: Report) -> NoReturn:
    report.inner(f"{what} is not simulated", "SIM000")
    raise Refused


def main() -> None:
    """Run as the program `omforge-atc-sim`."""
    result = run(sys.argv[1:])
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    sys.exit(result.exit_status)
