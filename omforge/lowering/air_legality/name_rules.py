"""Rules for the names of operators."""

from __future__ import annotations

import re
from collections.abc import Iterator

from omforge.lowering.air_legality.subject import AirSubject, describe
from omforge.lowering.legality.subject import Finding, Rule

_FLAG_SAFE = re.compile(r"[A-Za-z0-9_./-]+")


def names_are_unique(subject: AirSubject) -> Iterator[Finding]:
    """No two operators of a graph have one name, and none has no name."""
    for body in subject.bodies:
        seen: set[str] = set()
        for op in body.graph.ops:
            if not op.name:
                yield Finding(op.type or "an operator", "the operator has no name", "", "name it")
            elif op.name in seen:
                yield Finding(
                    describe(op),
                    "the operator has the name of another",
                    "edges to that name reach the last one of them",
                    "rename it",
                )
            seen.add(op.name)


def names_of_inputs_fit_the_flags(subject: AirSubject) -> Iterator[Finding]:
    """Names of inputs use A-Z a-z 0-9 _ . / - only."""
    for call in subject.root.data():
        if call.op.name and not _FLAG_SAFE.fullmatch(call.op.name):
            yield Finding(
                call.where,
                "the input's name does not fit atc's flags",
                "--input_shape and --dynamic_dims name inputs, and split at : and ;",
                "rename it",
            )


_LOADER = "hicann/ge:graph_metadef/graph/serialization/model_serialize.cc"

RULES = (
    Rule(
        "air-names-unique",
        "it is loaded, and joined wrongly",
        f"{_LOADER} (HandleNodeNameRef)",
        names_are_unique,
        certainty="seen",
    ),
    Rule(
        "air-input-names",
        "E10016, or the flag is taken apart wrongly",
        "hicann/ge:api/atc/omg.cc (CheckUserInputShape)",
        names_of_inputs_fit_the_flags,
        level="advice",
    ),
)
