"""How atc reads its command line: getopt_long with habits of its own.

Source: hicann/ge:api/atc/cmd_flag_info.cc.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from omforge.atc.flags import Flag, flags
from omforge.atc.sim.reports import Refused, Report

_TRUE = frozenset(("", "1", "t", "true", "y", "yes"))
_FALSE = frozenset(("0", "f", "false", "n", "no"))
_INT32_MAX = 2**31 - 1

# These report their wrong values as "must be 1 or 0", whatever they take.
_ZERO_OR_ONE = frozenset(
    (
        "status_check",
        "deterministic",
        "external_weight",
        "display_model_info",
        "atomic_clean_policy",
        "dump_mode",
        "disable_reuse_memory",
        "sparsity",
    )
)

FRAMEWORKS = "0(Caffe) or 1(MindSpore) or 3(TensorFlow) or 5(Onnx)"


class Helped(Exception):
    """--help was read: atc prints its usage and ends well, whatever follows."""


@dataclass
class Arguments:
    """The values of all flags, and which of them were given.

    Attributes:
        line: The command line as one string, which atc keeps in the .om.
        raw_options: What the file of --raw_ge_options says.
    """

    line: str
    values: dict[str, str] = field(default_factory=dict[str, str])
    given: set[str] = field(default_factory=set[str])
    raw_options: dict[str, str] = field(default_factory=dict[str, str])

    def __getitem__(self, name: str) -> str:
        return self.values.get(name, flags()[name].default)

    def number(self, name: str) -> int:
        """The value of an int32 flag."""
        return int(self[name] or 0)

    def on(self, name: str) -> bool:
        """The value of a bool flag."""
        return self[name].lower() in _TRUE if name in self.given else False


def parse(argv: Sequence[str], report: Report, stderr: list[str]) -> Arguments:
    """Read the words behind the program's name.

    Args:
        argv: The words.
        report: Takes coded errors.
        stderr: Takes the lines that atc writes to stderr.

    Raises:
        Refused: A word is wrong.
        Helped: --help was given.
    """
    arguments = Arguments(" ".join(("atc", *argv)))
    rest = [_formatted(word) for word in argv]
    positional: list[str] = []
    while rest:
        word = rest.pop(0)
        if word == "--":
            positional += rest
            break
        if word in ("-h", "--h"):
            raise Helped
        if not word.startswith("-") or word == "-":
            # getopt_long moves words that are no options to the end and goes on.
            positional.append(word)
            continue
        if not word.startswith("--"):
            _fail(stderr, f"unknown command line flag '{_bare(word)}'")
        name, equals, value = word[2:].partition("=")
        flag = _match(name)
        if flag is None:
            _fail(stderr, f"unknown command line flag '{_bare(word)}'")
        if not equals and flag.type != "bool":
            if not rest:
                _fail(stderr, f"flag '{word}' is missing its argument")
            value = rest.pop(0)
        _set(arguments, flag, value, report)
        if flag.name == "help" and arguments.on("help"):
            raise Helped
    if positional:
        stderr += [f"ERROR: Non-option parameter: {word}" for word in positional]
        raise Refused
    return arguments


def _fail(stderr: list[str], text: str) -> NoReturn:
    stderr.append(f"ERROR: {text}")
    raise Refused


def _formatted(word: str) -> str:
    """`-flag` becomes `--flag`, hyphens in a flag's name underscores; values stay as they are."""
    word = re.sub(r"^-(?=[A-Za-z]{2,})", "--", word)
    if not re.match(r"--(?=[A-Za-z]{2,})", word):
        return word
    name, equals, value = word.partition("=")
    return name[:4] + name[4:].replace("-", "_") + equals + value


def _bare(word: str) -> str:
    return re.sub(r"^-+|=.*", "", word)


def _match(name: str) -> Flag | None:
    """An exact name, or a prefix that only one flag has (getopt_long)."""
    table = flags()
    if name in table:
        return table[name]
    near = [flag for flag in table.values() if name and flag.name.startswith(name)]
    return near[0] if len(near) == 1 else None


def _set(arguments: Arguments, flag: Flag, value: str, report: Report) -> None:
    if flag.values and value not in flag.values:
        report_value(flag, value, report)
        raise Refused
    if flag.type == "bool" and value.lower() not in _TRUE | _FALSE:
        reason = "The value type must be [bool]."
        report.error("E10003", value=value, parameter=flag.name, reason=reason)
        raise Refused
    if flag.type == "int32" and not _is_int32(value):
        reason = "The value type must be [int32]."
        report.error("E10003", value=value, parameter=flag.name, reason=reason)
        raise Refused
    arguments.values[flag.name] = value
    arguments.given.add(flag.name)


def _is_int32(value: str) -> bool:
    return re.fullmatch(r"[0-9]+", value) is not None and int(value) <= _INT32_MAX


def report_value(flag: Flag, value: str, report: Report) -> None:
    """Report a value that an enumerated flag does not take."""
    if flag.name in _ZERO_OR_ONE:
        report.error("E10006", value=value, parameter=flag.name)
    elif flag.name == "log":
        report.error("E10010", loglevel=value)
    elif flag.name == "framework":
        report.error("E10007", parameter="framework", support=FRAMEWORKS)
    else:
        allowed = "".join(f"[{item}] " for item in sorted(flag.values))
        report.error(
            "E10001",
            value=value,
            parameter=f"--{flag.name}",
            reason=f"The value is not within the range of values. The valid range is {allowed}.",
        )


def usage(program: str = "atc") -> str:
    """The text of --help: the flags by name, with types, defaults and values."""
    lines = [f"usage: {program} <args>", ""]
    for flag in flags().values():
        takes = "|".join(flag.values or flag.values_checked_later)
        default = f" (default {flag.default})" if flag.default not in ("", "-1") else ""
        lines.append(f"  --{flag.name:<32} {takes or flag.type}{default}")
    return "\n".join(lines)
