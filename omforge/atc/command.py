"""The atc command line: made from typed options, and written to a script.

Only flags that exist can be written (hicann/ge:api/atc/atc_flags.cc): one unknown flag stops atc
before it compiles anything. Where two flags exclude each other there is one field of either type.
Flags that a user brings are checked by `omforge.atc.flags`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omforge.atc.find import find_atc
from omforge.atc.flags import check_flags, flag_name, flags
from omforge.ir.errors import InputError
from omforge.ir.fronts import Front
from omforge.lowering.target import Target

__all__ = [
    "AtcOptions",
    "CompressWeights",
    "MixedPrecision",
    "Precision",
    "PrecisionMode",
    "PrecisionModeV2",
    "atc_command",
    "check_path",
    "compile_script",
    "find_atc",
]

# hicann/ge:base/common/util.cc: letters, digits, _ - . / and CJK ideographs.
_SAFE_PATH = re.compile(r"[A-Za-z0-9_./\-\u4e00-\u9fa5]+")
_PATH_LIMIT = 4096

# hicann/ge:docs/zh/user_guides/atc_tools/CLI_options/--framework.md: 1 is MindSpore's, and what
# TorchAir exports.
_FRAMEWORKS: Mapping[Front, int] = {"onnx": 5, "air": 1}


@dataclass(frozen=True)
class PrecisionModeV2:
    """--precision_mode_v2 without mixing.

    `origin` keeps every tensor's dtype. atc's own default, fp16, turns float32 and bfloat16 into
    float16 wherever a kernel allows, and the numbers that were compared on the CPU would not be
    those that run. (Models with quantised activations must use mixed_float16 or fp16.)
    """

    mode: Literal["origin", "fp16", "cube_fp16in_fp32out", "cube_hif8"] = "origin"

    def words(self) -> tuple[str, ...]:
        """The flags."""
        return (f"--precision_mode_v2={self.mode}",)


@dataclass(frozen=True)
class PrecisionMode:
    """The older --precision_mode; atc refuses it beside --precision_mode_v2 (E10056)."""

    mode: Literal[
        "force_fp16",
        "force_fp32",
        "cube_fp16in_fp32out",
        "allow_fp32_to_fp16",
        "allow_fp32_to_bf16",
        "must_keep_origin_dtype",
    ]

    def words(self) -> tuple[str, ...]:
        """The flags."""
        return (f"--precision_mode={self.mode}",)


@dataclass(frozen=True)
class MixedPrecision:
    """Mixed precision, the only kind that --modify_mixlist goes with (E10001)."""

    mode: Literal["mixed_float16", "mixed_bfloat16", "mixed_hif8"]
    modify_mixlist: str | None = None

    def words(self) -> tuple[str, ...]:
        """The flags."""
        own = (f"--precision_mode_v2={self.mode}",)
        return own if self.modify_mixlist is None else (*own, _file(self, "modify_mixlist"))


Precision = PrecisionModeV2 | PrecisionMode | MixedPrecision


@dataclass(frozen=True)
class CompressWeights:
    """Weight compression: of all weights, or of those that a file lists; not both (E10047)."""

    compress_weight_conf: str | None = None

    def words(self) -> tuple[str, ...]:
        """The flags."""
        if self.compress_weight_conf is None:
            return ("--enable_compress_weight=true",)
        return (_file(self, "compress_weight_conf"),)


@dataclass(frozen=True)
class AtcOptions:
    """What may be chosen; the rest of the command follows from the model.

    Attributes:
        precision: One of the ways to say it.
        external_weight: 1 writes each constant beside the .om as weight/weight_<hash>, so that
            buckets may share them; 2 writes one file per .om; 0 keeps weights inside the .om.
        log: Level of atc's log.
        deterministic: 1 asks for kernels that give the same numbers on every run, 2 for strong
            consistency, 3 for consistency over batches. (--deterministic_level goes with
            --deterministic only.)
        op_compiler_cache_dir: Where compiled kernels are kept for the next run.
        fusion_switch_file: A file that turns built-in fusions off.
        compress_weights: Weight compression, if any.
        extra: Flags that the user brought, as `check_flags` takes them. One of them replaces ours
            of the same name, or those that it excludes.
    """

    precision: Precision = PrecisionModeV2()
    external_weight: Literal[0, 1, 2] = 1
    log: Literal["debug", "info", "warning", "error", "null"] = "error"
    deterministic: Literal[0, 1, 2, 3] = 0
    op_compiler_cache_dir: str | None = None
    fusion_switch_file: str | None = None
    compress_weights: CompressWeights | None = None
    extra: tuple[str, ...] = ()

    def words(self) -> tuple[str, ...]:
        """The flags, the user's last.

        Raises:
            InputError: A path has characters that atc refuses, or a flag of the user is wrong.
        """
        words = [
            *self.precision.words(),
            f"--external_weight={self.external_weight}",
            f"--log={self.log}",
        ]
        if self.deterministic:
            words += ["--deterministic=1", f"--deterministic_level={self.deterministic}"]
        if self.op_compiler_cache_dir is not None:
            words.append("--op_compiler_cache_mode=enable")
            words.append(_file(self, "op_compiler_cache_dir"))
        if self.fusion_switch_file is not None:
            words.append(_file(self, "fusion_switch_file"))
        if self.compress_weights is not None:
            words += self.compress_weights.words()
        extra = check_flags(self.extra)
        return (*(word for word in words if not _replaced(word, extra)), *extra)


def _file(options: object, name: str) -> str:
    path = str(getattr(options, name))
    check_path(name, path)
    return f"--{name}={path}"


def _replaced(word: str, extra: Sequence[str]) -> bool:
    """Whether the user's flags say the same thing, or something that excludes it."""
    name, _ = flag_name(word)
    given = {flag_name(item)[0] for item in extra}
    return name in given or any(name in flags()[other].excludes for other in given)


def atc_command(
    model_file: str,
    output: str,
    target: Target,
    shapes: Mapping[str, Sequence[int]],
    options: AtcOptions | None = None,
    gears: Sequence[Sequence[int]] = (),
    front: Front = "onnx",
) -> tuple[str, ...]:
    """Return the command that compiles one bucket.

    Args:
        model_file: The lowered .onnx or .air, relative to where the command runs: a GE graph's
            weights are as well.
        output: The result without its suffix: atc appends .om.
        target: The SoC.
        shapes: Every graph input's shape, in the graph's order; -1 for a dim that gears set.
        options: What may be chosen.
        gears: For each gear, a number for every -1 in the order in which the shapes have them.
        front: What the file holds. Of a GE graph the shapes are in the file, and only gears need
            them said again.

    Raises:
        InputError: A path or name has characters that atc refuses, or a dim is not positive.
    """
    options = options or AtcOptions()
    for what, path in (("model", model_file), ("output", output)):
        check_path(what, path)
    if not Path(output).name or output.endswith("/"):
        raise InputError(f"the output {output!r} has no file name", "atc appends .om to it")
    shape = _input_shape(shapes, dynamic=bool(gears))
    command = [
        "atc",
        f"--framework={_FRAMEWORKS[front]}",
        f"--model={model_file}",
        f"--output={output}",
        f"--soc_version={target.soc_version}",
        # The default NCHW would give 4-D activations image semantics.
        "--input_format=ND",
        *((f"--input_shape={shape}",) if gears or front == "onnx" else ()),
        *_dynamic_dims(shapes, gears),
        *options.words(),
    ]
    return tuple(command)


# What hicann/ge:docs/zh/user_guides/atc_tools/CLI_options states: 100 for 310P, A2 and A3, 256 for
# 950; and the runtime takes ND inputs of up to four dims where one of them has gears.
_MOST_GEARS = 100
_MOST_DIMS = 4


def _dynamic_dims(
    shapes: Mapping[str, Sequence[int]], gears: Sequence[Sequence[int]]
) -> tuple[str, ...]:
    """--dynamic_dims, where there are gears.

    Raises:
        InputError: atc would refuse them (E10035, E10039, E10045, E10003).
    """
    if not gears:
        return ()
    dynamic = sum(dim == -1 for shape in shapes.values() for dim in shape)
    fault = ""
    if not 2 <= len(gears) <= _MOST_GEARS:
        fault = f"there are {len(gears)}, and atc takes 2 to {_MOST_GEARS}"
    elif len({tuple(gear) for gear in gears}) < len(gears):
        fault = "two of them are equal"
    elif any(len(gear) != dynamic for gear in gears):
        fault = f"the shapes leave {dynamic} dims open, and each gear needs as many numbers"
    elif any(dim < 1 for gear in gears for dim in gear):
        fault = "a dim is positive"
    deep = [name for name, shape in shapes.items() if -1 in shape and len(shape) > _MOST_DIMS]
    if deep:
        fault = f"input {deep[0]} has more than {_MOST_DIMS} dims"
    if fault:
        raise InputError("these gears cannot be compiled", fault, "Choose other gears")
    return (f"--dynamic_dims={';'.join(','.join(map(str, gear)) for gear in gears)}",)


def _input_shape(shapes: Mapping[str, Sequence[int]], *, dynamic: bool) -> str:
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
        if any(dim < 1 and not (dynamic and dim == -1) for dim in shape):
            raise InputError(
                f"input {name} has the shape {list(shape)}",
                "a static --input_shape has positive numbers only",
                "Bind every symbol to a number",
            )
        # A scalar is the name with nothing behind the colon.
        parts.append(f"{name}:{','.join(map(str, shape))}")
    return ";".join(parts)


def check_path(what: str, path: str) -> None:
    """Raise InputError for a path with characters that atc refuses, or too many of them."""
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
