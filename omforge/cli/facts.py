"""--facts: the file that is named, or the one that lies in the user's configuration folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omforge.cli import console
from omforge.lowering.facts_file import facts_folder, find_facts, read_facts, target_with
from omforge.lowering.target import ALL_TARGETS
from omforge.lowering.target import target as find_target

if TYPE_CHECKING:
    from omforge.bundle.manifest import Manifest
    from omforge.runtime.acl_session import AclOptions

NONE = "none"


def chosen_facts(given: Path | None, soc: str) -> Path | None:
    """Return the facts file for a SoC, None for none; one that was found is told of.

    Raises:
        InputError: The SoC is not known, or what was found is no facts file of its family.
    """
    target = find_target(soc)
    if given is not None:
        return None if str(given) == NONE else given
    found = find_facts(target)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        console.say(f"warning: {facts_folder()} has {names}: none is taken, name one by --facts")
    if len(found) != 1:
        return None
    console.say(f"facts: {read_facts(found[0], target)} (--facts none leaves them aside)")
    return found[0]


def options_of_device(given: Path | None, manifest: Manifest, backend: str) -> AclOptions | None:
    """Return how a device runs a bundle by the facts of its SoC; None where none is asked.

    Raises:
        InputError: As `chosen_facts`.
    """
    from omforge.probe.device_options import acl_options

    if backend not in ("acl", "sim") or (given is None and manifest.target not in ALL_TARGETS):
        return None
    return acl_options(target_with(manifest.target, chosen_facts(given, manifest.target)).facts)
