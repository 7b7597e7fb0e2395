"""Swish and Gelu to operators that ATC registers at opset 16.

Neither Swish nor Gelu has a plugin in the default domain (hicann/ops-nn, hicann/ops-math: none
registered), and no fusion pass makes the fused forms again.
"""

from __future__ import annotations

import math

from omforge import ir
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    float_attribute,
    required_input,
)


def legalize_swish(op: Builder, node: ir.Node) -> None:
    """Swish (opset 24): x * sigmoid(alpha * x)."""
    x = required_input(node, 0)
    gate = op.mul(x, float_attribute(node, "alpha", 1.0))
    op.commit(op.mul(x, op.unary("Sigmoid", gate)))


def legalize_gelu(op: Builder, node: ir.Node) -> None:
    """Gelu (opset 20), exact or by tanh.

    ``none``: 0.5 * x * (1 + erf(x / sqrt(2)))
    ``tanh``: 0.5 * x * (1 + tanh(sqrt(2 / pi) * x * (1 + 0.044715 * x^2)))
    """
    x = required_input(node, 0)
    attribute = node.attributes.get("approximate")
    approximate = "none" if attribute is None else attribute.as_string()
    if approximate == "none":
        curve = op.unary("Erf", op.mul(x, 1 / math.sqrt(2)))
    elif approximate == "tanh":
        cubic = op.add(op.mul(op.mul(x, x), 0.044715), 1.0)
        curve = op.unary("Tanh", op.mul(op.mul(x, math.sqrt(2 / math.pi)), cubic))
    else:
        raise NotLegal(f"approximate is {approximate!r}, must be 'none' or 'tanh'")
    op.commit(op.mul(op.mul(x, 0.5), op.add(curve, 1.0)))
