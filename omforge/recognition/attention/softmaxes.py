"""Which softmaxes are attention's: the weights of a product with values, and not a router's."""

from __future__ import annotations

from omforge import ir
from omforge.recognition.views import scalar

_PASSED = frozenset(
    (
        *("Cast", "Identity", "Dropout", "Where", "Slice", "Split", "Expand"),
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze"),
    )
)
"""What stands between a softmax and the product; a sink is sliced off, and padding set to 0."""


def weighs_values(softmax: ir.Node) -> bool:
    """Whether what a softmax makes is multiplied by something computed, as probabilities by V.

    A router's goes through a TopK, or weighs sums; a head's is an output.
    """
    pending, seen = list(softmax.outputs[:1]), set[ir.Value]()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        for user in value.consumers():
            if user.op_type in ("MatMul", "Einsum"):
                if all(v is not None and not v.is_initializer() for v in user.inputs):
                    return True
            elif user.op_type in _PASSED or (
                user.op_type in ("Mul", "Div") and any(scalar(v) is not None for v in user.inputs)
            ):
                pending += user.outputs
    return False
