"""An atc command that was read from a bundle, and may be anybody's.

`build` runs it, so it may say how atc compiles the bucket's graph, and nothing else: its model and
its output are the bucket's, its flags are atc's, and where it writes is inside the bundle.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from omforge.atc.flags import INTERFACE, OTHER_USES, flag_name, flags
from omforge.ir.errors import InputError
from omforge.ir.paths import path_fault

_WORD = re.compile(r"--[a-z0-9_]+=.*")

# Flags whose value is a file or a folder that atc writes (hicann/ge:docs/zh/user_guides/atc_tools).
_WRITTEN = ("check_report", "debug_dir", "op_compiler_cache_dir", "mdl_bank_path")


def check_foreign(
    command: Sequence[str], model: str, output: str, *, trusted: bool = False
) -> None:
    """Check a bucket's command.

    Args:
        command: As the manifest has it; its first word is not run.
        model: The bucket's graph.
        output: What its --output must be.
        trusted: Whether it may write outside of the bundle.

    Raises:
        InputError: It does something else than compile that graph to that output.
    """
    found: dict[str, str] = {}
    for word in command[1:]:
        name, value = flag_name(word)
        if not _WORD.fullmatch(word) or value is None or name not in flags():
            raise _refused(f"{word!r} is no --name=value of atc")
        if name in INTERFACE or name in OTHER_USES or name == "mode":
            raise _refused(f"--{name} does not belong to the compilation of a bucket")
        if name in found:
            raise _refused(f"--{name} is there twice")
        found[name] = value
    for name, expected in (("model", model), ("output", output)):
        if found.get(name) != expected:
            raise _refused(f"its --{name} is {found.get(name)!r}, the bucket's is {expected!r}")
    for name in () if trusted else _WRITTEN:
        fault = path_fault(found[name]) if name in found else ""
        if fault:
            raise InputError(
                f"the bundle's atc command writes outside of the bundle: --{name}={found[name]}",
                f"the path {fault}",
                "If the bundle is yours, add --trust; else build it from the export yourself",
            )


def _refused(why: str) -> InputError:
    return InputError(
        "the bundle's atc command is not one that omforge wrote", why, "Compile the export again"
    )
