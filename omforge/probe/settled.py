"""Which rows of the tables a probe settles."""

from __future__ import annotations

from omforge.lowering.facts import claims
from omforge.probe.record import Probe


def settled(probe: Probe) -> tuple[str, ...]:
    """What the probe's answer is for: rows of tables, then what no table has."""
    rows = tuple(
        f"{table} {key}"
        for (table, key), claim in claims().items()
        if claim.partition("=")[0] == probe.id
    )
    return (*rows, probe.settles) if probe.settles else rows
