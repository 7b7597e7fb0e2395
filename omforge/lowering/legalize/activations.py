"""Swish and Gelu to operators that ATC registers at opset 16.

Neither Swish nor Gelu has a plugin in the default domain (hicann/ops-nn, hicann/ops-math: none
registered), and no fusion pass makes the fused forms again. Dynamic shapes are as good as static.
"""

from __future__ import annotations

import math

from omforge import ir
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    Results,
    float_attribute,
    required_input,
)

FAST_GELU_ALPHA = 1.702
"""Of the Swish that FastGelu computes."""


def legalize_swish(op: Builder, node: ir.Node) -> Results:
    """Swish (opset 24): x * sigmoid(alpha * x)."""
    x = required_input(node, 0)
    gate = op.mul(x, float_attribute(node, "alpha", 1.0))
    return (op.mul(x, op.unary("Sigmoid", gate)),)


def swish_fast_gelu(op: Builder, node: ir.Node) -> Results:
    """Swish with alpha 1.702, which exporters of "quick GELU" write."""
    alpha = float_attribute(node, "alpha", 1.0)
    if not math.isclose(alpha, FAST_GELU_ALPHA, rel_tol=1e-6):
        raise NotLegal(f"alpha is {alpha:g}, must be {FAST_GELU_ALPHA}")
    return op.target_op("NPUFastGelu", required_input(node, 0))


def legalize_gelu(op: Builder, node: ir.Node) -> Results:
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
    return (op.mul(op.mul(x, 0.5), op.add(curve, 1.0)),)
