"""Routers: the choice of a token's experts, of which there is one for each mixture."""

from __future__ import annotations

from omforge import ir
from omforge.ir.values import attribute
from omforge.recognition.views import shape_of

_STOPS = {"Attention", "Gemm", "LayerNormalization", "MatMul", "RMSNormalization"}
"""Behind these is another block."""


def find_routers(model: ir.Model) -> list[ir.Node]:
    """The TopK of scores [.., E] that say which experts a token has.

    A router that first chooses groups of experts has several, and only the last one chooses for the
    experts.
    """
    return [node for node in model.graph if _chooses(node) and not _goes_into_another(node)]


def _chooses(node: ir.Node) -> bool:
    """Whether it takes the largest of a known number of scores, and says which they are."""
    if node.op_type != "TopK" or node.domain != "" or not attribute(node, "largest", 1):
        return False
    scores = node.inputs[0]
    shape = shape_of(scores)
    if scores is None or scores.dtype is None or not scores.dtype.is_floating_point():
        return False
    axis = attribute(node, "axis", -1)
    last = axis in (-1, len(shape) - 1) and len(shape) > 1 and isinstance(shape[-1], int)
    return last and bool(node.outputs[1].uses())


def _goes_into_another(node: ir.Node) -> bool:
    """Whether another choice depends on this one, with no product in between."""
    pending, seen = list(node.outputs), set(node.outputs)
    while pending:
        for user in pending.pop().consumers():
            if _chooses(user):
                return True
            if user.op_type in _STOPS:
                continue
            new = [value for value in user.outputs if value not in seen]
            seen.update(new)
            pending += new
    return False
