"""The atc command line: made, written to a script, and run.

Only flags that exist (hicann/ge:api/atc/atc_flags.cc): one unknown flag stops atc before it
compiles anything. Tutorials show flags that do not exist: --quant_type, --enable_fusion,
--enable_mem_reuse, --enable_small_channel_eliminate, --compress_kv_cache, --mem_limit.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omforge.ir.errors import InputError
from omforge.lowering.target import Target

log = logging.getLogger(__name__)

SUCCESS = "ATC run success"

# Where installers put atc below a CANN directory; the toolkit links it into bin/.
_BELOW_HOME = ("bin/atc", "compiler/bin/atc")
_HOME_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_DEFAULT_HOME = "/usr/local/Ascend/ascend-toolkit/latest"

# hicann/ge:base/common/util.cc: letters, digits, _ - . / and CJK ideographs.
_SAFE_PATH = re.compile(r"[A-Za-z0-9_./\-\u4e00-\u9fa5]+")
_PATH_LIMIT = 4096

# hicann/ge:base/common/error_registry/error_registry.cc; EZ9999 and the like come from operators.
_CODE = re.compile(r"\b([EW][0-9A-Z]\d{4})\b")

# A plugin that loses an input logs this and the run still succeeds (seen with
# NPUIncreFlashAttention).
_SILENT_FAILURE = "E18888"


@dataclass(frozen=True)
class AtcOptions:
    """What may be chosen; the rest of the command follows from the model.

    Attributes:
        precision_mode_v2: `origin` keeps every tensor's dtype. atc's own default, fp16, turns
            float32 and bfloat16 into float16 wherever a kernel allows, and the numbers that were
            compared on the CPU would not be those that run. (Models quantised by AMCT must use
            mixed_float16 or fp16 instead; omforge makes none.)
        external_weight: 1 writes each constant beside the .om as weight/weight_<hash>, so that
            buckets may share them; 2 writes one file per .om; 0 keeps weights inside the .om.
        log: Level of atc's log.
        deterministic: Ask for kernels that give the same numbers on every run.
        op_compiler_cache_dir: Where compiled kernels are kept for the next run.
        fusion_switch_file: A file that turns built-in fusions off.
    """

    precision_mode_v2: Literal[
        "origin",
        "fp16",
        "cube_fp16in_fp32out",
        "mixed_float16",
        "mixed_bfloat16",
    ] = "origin"
    external_weight: Literal[0, 1, 2] = 1
    log: Literal["debug", "info", "warning", "error", "null"] = "error"
    deterministic: bool = False
    op_compiler_cache_dir: str | None = None
    fusion_switch_file: str | None = None


@dataclass(frozen=True)
class AtcResult:
    """What a run of atc gave.

    Attributes:
        ok: It exited with 0, said so, and did not log that it lost an input.
        exit_status: Of the process.
        codes: Error and warning codes in order of first appearance, with the line they stood in.
        om: The file that was made, if any: `<output>.om` or `<output>_<os>_<arch>.om`.
        log: The file that holds all that atc wrote.
        seconds: How long it took.
    """

    ok: bool
    exit_status: int
    codes: Mapping[str, str]
    om: Path | None
    log: Path
    seconds: float


def atc_command(
    model_file: str,
    output: str,
    target: Target,
    shapes: Mapping[str, Sequence[int]],
    options: AtcOptions | None = None,
) -> tuple[str, ...]:
    """Return the command that compiles one bucket.

    Args:
        model_file: The lowered .onnx, relative to where the command runs.
        output: The result without its suffix: atc appends .om.
        target: The SoC.
        shapes: Every graph input's static shape, in the graph's order.
        options: What may be chosen.

    Raises:
        InputError: A path or name has characters that atc refuses, or a dim is not positive.
    """
    options = options or AtcOptions()
    for what, path in (("model", model_file), ("output", output)):
        _check_path(what, path)
    if not Path(output).name or output.endswith("/"):
        raise InputError(f"the output {output!r} has no file name", "atc appends .om to it")
    command = [
        "atc",
        "--framework=5",  # ONNX
        f"--model={model_file}",
        f"--output={output}",
        f"--soc_version={target.soc_version}",
        # The default NCHW would give 4-D activations image semantics.
        "--input_format=ND",
        f"--input_shape={_input_shape(shapes)}",
        f"--precision_mode_v2={options.precision_mode_v2}",
        f"--external_weight={options.external_weight}",
        f"--log={options.log}",
    ]
    if options.deterministic:
        # Both or neither: atc refuses one without the other.
        command += ["--deterministic=1", "--deterministic_level=1"]
    if options.op_compiler_cache_dir is not None:
        _check_path("op_compiler_cache_dir", options.op_compiler_cache_dir)
        command.append("--op_compiler_cache_mode=enable")
        command.append(f"--op_compiler_cache_dir={options.op_compiler_cache_dir}")
    if options.fusion_switch_file is not None:
        _check_path("fusion_switch_file", options.fusion_switch_file)
        command.append(f"--fusion_switch_file={options.fusion_switch_file}")
    return tuple(command)


def _input_shape(shapes: Mapping[str, Sequence[int]]) -> str:
    if not shapes:
        raise InputError("the model has no inputs", "atc stops with E16001")
    parts: list[str] = []
    for name, shape in shapes.items():
        if not name or re.search(r"[;,\s]", name):
            raise InputError(
                f"the input name {name!r} cannot be written in --input_shape",
                "; and , separate inputs and dims",
                "Rename the input",
            )
        if any(dim < 1 for dim in shape):
            raise InputError(
                f"input {name} has the shape {list(shape)}",
                "a static --input_shape has positive numbers only",
                "Bind every symbol to a number",
            )
        # A scalar is the name with nothing behind the colon.
        parts.append(f"{name}:{','.join(map(str, shape))}")
    return ";".join(parts)


def _check_path(what: str, path: str) -> None:
    if not _SAFE_PATH.fullmatch(path):
        bad = "".join(sorted(set(_SAFE_PATH.sub("", path)))) or "nothing at all"
        raise InputError(
            f"atc refuses the path {path!r} of the {what}",
            f"it contains {bad!r}; allowed are A-Z a-z 0-9 _ - . / and CJK ideographs",
            "Rename the folder or file, or work in another folder",
        )
    if len(path) >= _PATH_LIMIT:
        raise InputError(
            f"the path of the {what} has {len(path)} characters",
            f"atc takes fewer than {_PATH_LIMIT}",
        )


def find_atc(environment: Mapping[str, str] | None = None) -> Path | None:
    """Return the atc program, or None: on the PATH, then below the CANN directories.

    Args:
        environment: Instead of os.environ.
    """
    environment = os.environ if environment is None else environment
    found = shutil.which("atc", path=environment.get("PATH", ""))
    if found is not None:
        return Path(found)
    homes = [environment[name] for name in _HOME_VARIABLES if environment.get(name)]
    for home in (*homes, _DEFAULT_HOME):
        for below in _BELOW_HOME:
            candidate = Path(home) / below
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return candidate
    return None


def run_atc(
    command: Sequence[str],
    cwd: Path,
    log_file: Path,
    *,
    program: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> AtcResult:
    """Run an atc command, its output going to a file line by line.

    A failed compilation is a result, not an exception.

    Args:
        command: As `atc_command` returns it.
        cwd: What the paths of the command are relative to.
        log_file: Receives all that atc writes.
        program: The atc to run; found by `find_atc` if None.
        on_line: Is called with each line as it comes.

    Raises:
        InputError: There is no atc, it cannot be started, or `cwd` has a path that atc refuses.
    """
    # atc checks the real path, so a folder with a space fails whatever the command says.
    _check_path("working folder", str(cwd.resolve()))
    program = program or find_atc()
    if program is None:
        raise InputError(
            "atc was not found",
            f"it is neither on the PATH nor below {', '.join(_HOME_VARIABLES)} or {_DEFAULT_HOME}",
            "Install CANN and source its set_env.sh, or run the bundle's compile.sh elsewhere",
        )
    log.info("%s", shlex.join(command))
    started = time.monotonic()
    lines: list[str] = []
    log_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            log_file.open("w", encoding="utf-8") as sink,
            subprocess.Popen(
                [str(program), *command[1:]],
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                sink.write(line)
                sink.flush()
                lines.append(line.rstrip("\n"))
                if on_line is not None:
                    on_line(lines[-1])
            status = process.wait()
    except OSError as error:
        raise InputError(f"cannot run {program}", str(error)) from error
    codes = _codes(lines)
    said_so = any(SUCCESS in line for line in lines)
    return AtcResult(
        ok=status == 0 and said_so and _SILENT_FAILURE not in codes,
        exit_status=status,
        codes=codes,
        om=_om_of(command, cwd, started_at=time.time() - (time.monotonic() - started)),
        log=log_file,
        seconds=time.monotonic() - started,
    )


def _codes(lines: Sequence[str]) -> Mapping[str, str]:
    codes: dict[str, str] = {}
    for line in lines:
        for code in _CODE.findall(line):
            codes.setdefault(code, line.strip())
    return codes


def _om_of(command: Sequence[str], cwd: Path, started_at: float) -> Path | None:
    """The .om that this run wrote; one that was there before is not a result."""
    prefix = "--output="
    output = next((item[len(prefix) :] for item in command if item.startswith(prefix)), "")
    stem = cwd / output
    # A second of slack: file systems keep coarser times than clocks do.
    made = [
        path
        for path in (Path(f"{stem}.om"), *sorted(stem.parent.glob(f"{stem.name}_*_*.om")))
        if path.is_file() and path.stat().st_mtime >= started_at - 1
    ]
    return made[0] if made else None


def compile_script(commands: Sequence[Sequence[str]]) -> str:
    """Return a POSIX shell script that runs the commands from its own folder.

    The paths in the commands are relative to the bundle, so the bundle may be moved to the machine
    that has CANN. `ATC=/path/to/atc` chooses the program.
    """
    lines = [
        "#!/bin/sh",
        "# Compiles every graph of this bundle. Needs CANN: source its set_env.sh first.",
        "# atc refuses folders with other characters than A-Z a-z 0-9 _ - . / in their path.",
        "set -eu",
        "unset CDPATH",
        'cd -- "$(dirname -- "$0")"',
        "",
    ]
    for command in commands:
        lines.append(_command_lines(command))
        lines.append("")
    return "\n".join(lines)


def _command_lines(command: Sequence[str]) -> str:
    program = '"${ATC:-atc}"' if command[0] == "atc" else shlex.quote(command[0])
    return " \\\n    ".join([program, *(shlex.quote(item) for item in command[1:])])
