"""All rules that look at a loaded model, and how they are applied."""

from __future__ import annotations

from omforge import ir
from omforge.lowering.legality import (
    attention_rules,
    inference_rules,
    int8_rules,
    interface_rules,
    kernel_rules,
    name_rules,
    operator_rules,
    plugin_rules,
    quantization_rules,
    special_rules,
    tensor_rules,
)
from omforge.lowering.legality.subject import Offence, Rule, Subject, as_seen, judge
from omforge.lowering.legalize.dialect import OPSET
from omforge.lowering.target import Target

RULES: tuple[Rule[Subject], ...] = (
    *interface_rules.RULES,
    *name_rules.RULES,
    *tensor_rules.RULES,
    *operator_rules.RULES,
    *plugin_rules.RULES,
    *inference_rules.RULES,
    *special_rules.RULES,
    *attention_rules.RULES,
    *quantization_rules.RULES,
    *int8_rules.RULES,
    *kernel_rules.RULES,
)


def check_legal(
    model: ir.Model, target: Target, *, opset: int = OPSET, gears: bool = False
) -> list[Offence]:
    """Return all offences of a lowered model against the ATC dialect; empty for a legal model.

    Nothing is changed. The dialect is stricter than atc: advice counts as well.

    Args:
        model: A lowered model: static, or with symbols in its inputs' shapes where `gears`.
        target: The SoC that it is for.
        opset: The opset that the model must have.
        gears: Whether symbolic dims stand for gears (atc's --dynamic_dims).

    Returns:
        Diagnostics in the order of the rules, each with the rule's name as `code`, and in `why`
        what atc does and the source.
    """
    subject = Subject(model, target, opset, gears=gears, dialect=True)
    rules = (*RULES, *tensor_rules.MEMORY_RULES)
    return [as_seen(offence, target) for rule in rules for offence in judge(rule, subject)]
