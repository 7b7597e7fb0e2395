"""Activations by GE's own operators: forms of the front air."""

from __future__ import annotations

from omforge import ir
from omforge.lowering.legalize.builder import (
    Builder,
    Results,
    dims,
    float_attribute,
    required_input,
)


def swish(op: Builder, node: ir.Node) -> Results:
    """Swish: x * sigmoid(alpha x)."""
    x = required_input(node, 0)
    alpha = float_attribute(node, "alpha", 1.0)
    return op.ge("Swish", {"x": x}, [(x.dtype, dims(x))], scale=float(alpha))


def gelu_v2(op: Builder, node: ir.Node) -> Results:
    """Gelu by erf or tanh, as GeluV2."""
    x = required_input(node, 0)
    found = node.attributes.get("approximate")
    approximate = "none" if found is None else found.as_string()
    return op.ge("GeluV2", {"x": x}, [(x.dtype, dims(x))], approximate=approximate)
