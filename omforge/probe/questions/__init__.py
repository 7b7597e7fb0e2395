"""All probes, by subject: `controls` first, which the others stand on."""

from __future__ import annotations

from collections.abc import Mapping

from omforge.probe.questions import (
    attention,
    cache,
    controls,
    device,
    ge_loader,
    graphs,
    layers,
    operators,
    parser,
    standard,
)
from omforge.probe.record import Probe

PROBES: Mapping[str, Probe] = {
    probe.id: probe
    for subject in (
        controls,
        parser,
        operators,
        standard,
        device,
        cache,
        attention,
        graphs,
        layers,
        ge_loader,
    )
    for probe in subject.PROBES
}
"""By id, in the order in which they are asked."""


def probes_for(family: str) -> tuple[Probe, ...]:
    """The probes of a SoC family."""
    return tuple(probe for probe in PROBES.values() if family in probe.families)
