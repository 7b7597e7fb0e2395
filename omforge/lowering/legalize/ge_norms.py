"""RMSNormalization by GE's own operators, whose epsilon is an attribute: forms of the front air."""

from __future__ import annotations

from omforge import ir
from omforge.lowering.legalize.builder import Builder, NotLegal, Results, dims
from omforge.lowering.legalize.norms import fused_operands, summands


def rms_norm(op: Builder, node: ir.Node) -> Results:
    """As RmsNorm, with the epsilon that the model has."""
    x, gamma, epsilon = fused_operands(node)
    shape = dims(x)
    # x and gamma of one dtype: 310P takes no other.
    weight = op.cast(op.reshape(gamma, shape[-1:]), x.dtype or ir.DataType.FLOAT)
    outputs = [(x.dtype, shape), (ir.DataType.FLOAT, (*shape[:-1], 1))]
    return (op.ge("RmsNorm", {"x": x, "gamma": weight}, outputs, epsilon=float(epsilon))[0],)


def add_rms_norm(op: Builder, node: ir.Node) -> Results:
    """As AddRmsNorm, where x is a sum that others read, too: one kernel for both."""
    x, gamma, epsilon = fused_operands(node)
    terms = summands(node, x)
    if x.dtype is None:
        raise NotLegal("the dtype of x is not known")
    shape = dims(x)
    weight = op.cast(op.reshape(gamma, shape[-1:]), x.dtype)
    operands = {"x1": terms[0], "x2": terms[1], "gamma": weight}
    outputs = [(x.dtype, shape), (ir.DataType.FLOAT, (*shape[:-1], 1)), (x.dtype, shape)]
    y, _, total = op.ge("AddRmsNorm", operands, outputs, epsilon=float(epsilon))
    op.replace(x, total)
    return (y,)
