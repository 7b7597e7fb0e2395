"""Full-conversion legality: everything that ATC would refuse or get wrong, listed at once.

ATC reports what it finds piecemeal, some of it as a crash, some not at all. Each rule is one small
function, listed in `RULES` with what atc does and where that was read.
"""

from __future__ import annotations

from omforge import ir
from omforge.lowering.legality import (
    interface_rules,
    operator_rules,
    special_rules,
    tensor_rules,
)
from omforge.lowering.legality.subject import Finding, Rule, Subject
from omforge.lowering.legalize.dialect import OPSET
from omforge.lowering.target import Target

__all__ = ["RULES", "Finding", "Rule", "check_legal"]

RULES: tuple[Rule, ...] = (
    *interface_rules.RULES,
    *tensor_rules.RULES,
    *operator_rules.RULES,
    *special_rules.RULES,
)


def check_legal(model: ir.Model, target: Target, *, opset: int = OPSET) -> list[ir.Diagnostic]:
    """Return all offences of a model against the ATC dialect; an empty list is a legal model.

    Nothing is changed. The model is static: a bucket with numbers for all symbols.

    Args:
        model: A lowered model.
        target: The SoC that it is for.
        opset: The opset that the model must have.

    Returns:
        Diagnostics in the order of the rules, each with the rule's name as `code`, and in `why`
        what atc does and the source.
    """
    subject = Subject(model, target, opset)
    return [
        ir.Diagnostic(
            where=finding.where,
            what=finding.what,
            why=_why(finding, rule),
            remedy=finding.remedy,
            code=rule.id,
        )
        for rule in RULES
        for finding in rule.check(subject)
    ]


def _why(finding: Finding, rule: Rule) -> str:
    told = f"{finding.why}; " if finding.why else ""
    return f"{told}atc: {rule.atc} ({rule.source})"
