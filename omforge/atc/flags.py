"""The flags of atc's command line, as data, and what to do instead of those it does not have.

The table is `lowering/data/atc_flags.tsv`: one row per flag of CANN 9.2, with its type, default,
the values that atc checks, and the flags that it excludes
(hicann/ge:api/atc/{atc_flags,cmd_flag_info}.cc, compiler/api/aclgrph/option_utils.cc).

atc stops at a flag that it does not have before it compiles anything, and tutorials show several of
those. `check_flags` answers them with what does the job.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from omforge.ir.errors import InputError
from omforge.lowering.tables import table_rows


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: Without the hyphens.
        type: As atc defines it; every type but bool needs an argument.
        default: As text.
        values: The values that atc takes, checked while it reads its command line.
        values_checked_later: The values that it takes, checked after that.
        excludes: Flags that cannot be given with it.
        source: Where it is defined.
    """

    name: str
    type: Literal["string", "int32", "bool"]
    default: str
    values: tuple[str, ...]
    values_checked_later: tuple[str, ...]
    excludes: tuple[str, ...]
    source: str


@functools.lru_cache(maxsize=1)
def flags() -> Mapping[str, Flag]:
    """Return every flag of atc by its name."""
    return {
        row["name"]: Flag(
            row["name"],
            _type(row["type"]),
            row["default"],
            _list(row["values"]),
            _list(row["values_checked_later"]),
            _list(row["excludes"]),
            row["source"],
        )
        for row in table_rows("atc_flags.tsv")
    }


def _type(text: str) -> Literal["string", "int32", "bool"]:
    if text == "int32":
        return "int32"
    return "bool" if text == "bool" else "string"


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


INSTEAD: Mapping[str, str] = {
    "quant_type": (
        "quantise the graph itself (NPUWeightQuantBatchMatmulV2, AscendQuant/AscendDequant); "
        "--compression_optimize_conf calibrates instead, with AMCT and an NPU on this machine"
    ),
    "enable_fusion": (
        "leave it out: atc's fusions are on; --fusion_switch_file=FILE turns some of them off"
    ),
    "enable_mem_reuse": "leave it out: memory is reused; --disable_reuse_memory=1 turns that off",
    "enable_small_channel_eliminate": (
        "leave it out; --enable_small_channel=1 is for convolutions of at most 4 channels"
    ),
    "compress_kv_cache": (
        "leave it out; atc knows of no cache: an int8 cache is written into the graph (quantise on "
        "write, AscendAntiQuant on read)"
    ),
    "mem_limit": (
        "leave it out, for there is no such limit: choose a smaller --context or --batch, and read "
        "what the .om needs with aclmdlQuerySize or --mode=6"
    ),
    "auto_tune_mode": "atc refuses every value of it: tune with the AOE tool",
}
"""Flags of tutorials that atc does not have or refuses, and what does the job."""

VALUES_INSTEAD: Mapping[tuple[str, str], str] = {
    ("precision_mode", "allow_quantize"): (
        "no precision mode quantises: quantise the graph itself "
        "(NPUWeightQuantBatchMatmulV2, AscendQuant/AscendDequant) and compile with "
        "--precision_mode_v2=origin, or mixed_float16 where activations are int8"
    ),
}
"""Values of tutorials that an existing flag does not take, and what does the job."""

OURS = frozenset(
    (
        "model",
        "output",
        "framework",
        "soc_version",
        "mode",
        "input_format",
        "input_shape",
        "input_shape_range",
        "input_hint_shape",
        "dynamic_batch_size",
        "dynamic_image_size",
        "dynamic_dims",
    )
)
"""What every command of a bundle states already, and must state to fit its bucket."""


INTERFACE = frozenset(("out_nodes", "output_type", "input_fp16_nodes", "insert_op_conf"))
"""What would give an .om other inputs or outputs than the manifest states."""

OTHER_USES = frozenset(("help", "singleop", "om", "json", "display_model_info"))
"""What belongs to atc's other uses than compiling a model."""


def flag_name(word: str) -> tuple[str, str | None]:
    """Split `--name=value`: atc takes one hyphen for two and `-` for `_` inside the name.

    Source: hicann/ge:api/atc/cmd_flag_info.cc (FormatArgv).
    """
    name, equals, value = word.partition("=")
    return name.lstrip("-").replace("-", "_"), value if equals else None


def check_flags(words: Sequence[str]) -> tuple[str, ...]:
    """Return the user's flags as `--name=value`, or say what is wrong with the first bad one.

    Args:
        words: `--name=value`, or `--name` and its value as the next word.

    Raises:
        InputError: A flag that atc does not have, a value that it does not take, two flags that
            exclude each other, or one that the bundle decides.
    """
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not re.match(r"--?[A-Za-z]{2}", word):
            raise InputError(
                f"{word!r} is not a flag of atc",
                "atc takes no positional words",
                "Write --name=value, and quote a value that holds a semicolon",
            )
        name, value = flag_name(word)
        flag = _known(name)
        if value is None:
            value = "true" if flag.type == "bool" else (rest.pop(0) if rest else None)
        if value is None:
            raise InputError(f"--{name} has no value", "every flag of atc needs one")
        _check_value(flag, value)
        found[name] = value
    _check_exclusions(found)
    return tuple(f"--{name}={value}" for name, value in found.items())


def _known(name: str) -> Flag:
    if name in INSTEAD:
        raise InputError(f"atc does not take --{name}", "", _sentence(INSTEAD[name]))
    if name in OURS:
        raise InputError(
            f"--{name} cannot be chosen",
            "each command of a bundle states it to fit its graph",
            "Leave it out; --target, --context, --prefill, --batch and --gears decide it",
        )
    if name in INTERFACE:
        raise InputError(
            f"--{name} cannot be chosen",
            "it changes the inputs or outputs of the .om, and the bundle's manifest states them",
            "Leave it out; --dtype chooses the dtype of the lowered graphs",
        )
    if name in OTHER_USES:
        raise InputError(
            f"--{name} cannot be chosen",
            "it is for other uses of atc than compiling a graph",
            "Leave it out, and run atc itself for those",
        )
    flag = flags().get(name)
    if flag is None:
        near = difflib.get_close_matches(name, flags(), n=1)
        raise InputError(
            f"atc has no flag --{name}",
            "it stops at an unknown flag before it compiles anything "
            "(hicann/ge:api/atc/cmd_flag_info.cc)",
            f"Did you mean --{near[0]}?" if near else "atc --help lists the flags",
        )
    return flag


def _check_value(flag: Flag, value: str) -> None:
    instead = VALUES_INSTEAD.get((flag.name, value))
    if instead is not None:
        raise InputError(f"atc refuses --{flag.name}={value}", "E10001", _sentence(instead))
    allowed = flag.values or flag.values_checked_later
    if allowed and value not in allowed:
        raise InputError(
            f"atc refuses --{flag.name}={value}",
            f"it takes {', '.join(allowed)} ({flag.source})",
            "Write one of those",
        )
    if flag.type == "int32" and not re.fullmatch(r"[0-9]+", value):
        raise InputError(f"atc refuses --{flag.name}={value}", "it takes digits only (E10003)")


def _check_exclusions(found: Mapping[str, str]) -> None:
    for name in found:
        for other in flags()[name].excludes:
            if other in found:
                raise InputError(
                    f"--{name} and --{other} exclude each other",
                    "atc refuses a command that has both (E10009, E10047 or E10056)",
                    "Keep one of them",
                )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
