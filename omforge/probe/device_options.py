"""How a bundle is run on a device, by what was seen of it."""

from __future__ import annotations

from omforge.lowering.facts import Facts
from omforge.runtime.acl_device import KvCopy
from omforge.runtime.acl_session import AclOptions


def acl_options(facts: Facts, device: int = 0) -> AclOptions:
    """Return the options that facts decide; what was not seen is left at its careful default."""
    kv_copy: KvCopy = "auto"
    copied = facts.verdict("copy-2d-within-device=right")
    if copied is not None:
        kv_copy = "2d" if copied.holds else "rows"
    workspace = facts.verdict("one-workspace=right")
    apart = facts.is_seen("weights-by-pyacl=wrong")
    return AclOptions(
        device=device,
        kv_copy=kv_copy,
        share_workspace=workspace is None or workspace.holds,
        share_weights="no" if apart else "auto",
    )
