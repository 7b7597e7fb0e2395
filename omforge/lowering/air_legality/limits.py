"""A rule for one fused operator: what its tiling refuses, one sentence for each fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from omforge.lowering.air_legality.subject import AirSubject, Call
from omforge.lowering.legality.subject import Certainty, Finding, Rule
from omforge.lowering.target import Target

Faults = Callable[[Call, Target], Iterator[str]]

TRANSFORMER = "mirror-cann/ops-transformer"
NN = "hicann/ops-nn"


def limit(
    name: str,
    op_types: tuple[str, ...],
    source: str,
    faults: Faults,
    certainty: Certainty = "source",
) -> Rule[AirSubject]:
    """A rule about operators of these types; its demand is the docstring of `faults`."""

    def check(subject: AirSubject) -> Iterator[Finding]:
        for call in subject.typed(*op_types):
            if not _told(call):
                continue  # another rule's
            for fault in faults(call, subject.target):
                yield Finding(
                    call.where,
                    f"{call.op.type}: {fault}",
                    "",
                    "stay within its limits, or use plain operators",
                )

    check.__doc__ = faults.__doc__
    return Rule(name, "EZ9999 in tiling or inference", source, check, certainty)


def _told(call: Call) -> bool:
    """Whether all required attributes are there, which the limits are about."""
    assert call.prototype is not None
    required = (item.name for item in call.prototype.attributes if item.required)
    return all(name in call.op.attributes for name in required)
