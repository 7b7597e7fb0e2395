"""All rules that look at a GE graph."""

from __future__ import annotations

from collections.abc import Mapping

from omforge.lowering.air_legality import (
    attention_limits,
    attribute_rules,
    cache_limits,
    cache_rules,
    constant_rules,
    edge_rules,
    expert_limits,
    file_rules,
    interface_rules,
    kernel_rules,
    layer_limits,
    name_rules,
    product_limits,
    shape_rules,
    slot_rules,
)
from omforge.lowering.air_legality.subject import AirSubject
from omforge.lowering.legality.subject import Rule

AIR_RULES: tuple[Rule[AirSubject], ...] = (
    *file_rules.RULES,
    *name_rules.RULES,
    *edge_rules.RULES,
    *interface_rules.RULES,
    *slot_rules.RULES,
    *attribute_rules.RULES,
    *constant_rules.RULES,
    *kernel_rules.RULES,
    *cache_rules.RULES,
    *shape_rules.RULES,
    *attention_limits.RULES,
    *cache_limits.RULES,
    *layer_limits.RULES,
    *product_limits.RULES,
    *expert_limits.RULES,
)

AIR_RULE_IDS: Mapping[str, Rule[AirSubject]] = {rule.id: rule for rule in AIR_RULES}
