"""RMSNormalization to NPURmsNorm, LayerNormalization to the operators of opset 16."""

from __future__ import annotations

import math

from omforge import ir
from omforge.ir.ops import RMS_NORM_EPSILON
from omforge.ir.values import constant
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    Results,
    dims,
    float_attribute,
    int_attribute,
    optional_input,
    required_input,
    used_output,
)


def rms_npu(op: Builder, node: ir.Node) -> Results:
    """RMSNormalization (opset 23) by the fused operator.

    ATC's plugin ignores epsilon and always uses 1e-6
    (hicann/ops-nn:norm/rms_norm/framework/npu_rms_norm_onnx_plugin.cpp), so another epsilon has x
    scaled first. With s = sqrt(1e-6 / epsilon)::

        s*x / sqrt(mean((s*x)^2) + 1e-6)  =  x / sqrt(mean(x^2) + epsilon)
    """
    x, gamma, epsilon = fused_operands(node)
    dtype = _dtype(x)
    scale = 1.0 if _is_fixed(epsilon) else math.sqrt(RMS_NORM_EPSILON / epsilon)
    # A scale above 1 (epsilon below 1e-6) may overflow fp16; below 1 nothing can.
    wide = ir.DataType.FLOAT if scale > 1 else dtype
    scaled = op.mul(op.cast(x, wide), scale)
    # x and gamma of one dtype: 310P takes no other.
    weight = op.cast(op.reshape(gamma, dims(x)[-1:]), wide)
    return (op.cast(op.target_op("NPURmsNorm", scaled, weight)[0], dtype),)


def rms_npu_add(op: Builder, node: ir.Node) -> Results:
    """RMSNormalization of a sum: the sum, which others read too, comes out beside it."""
    x, gamma, epsilon = fused_operands(node)
    if not _is_fixed(epsilon):
        raise NotLegal(f"epsilon is {epsilon:g}, and the sum cannot be scaled ahead of the norm")
    terms = summands(node, x)
    weight = op.cast(op.reshape(gamma, dims(x)[-1:]), _dtype(x))
    y, _, total = op.target_op("NPUAddRmsNorm", *terms, weight)
    op.replace(x, total)
    return (y,)


def summands(node: ir.Node, x: ir.Value) -> list[ir.Value]:
    """The two terms whose sum a norm reads, where one operator may make sum and norm.

    Raises:
        NotLegal: It may not.
    """
    add = x.producer()
    if add is None or add.op_type != "Add" or add.domain != "" or x.is_graph_output():
        raise NotLegal("x is no sum")
    terms = [required_input(add, 0), required_input(add, 1)]
    if any(dims(term) != dims(x) or term.dtype != x.dtype for term in terms):
        raise NotLegal("the terms of the sum are not of one shape")
    if not _all_after(node, x):
        raise NotLegal("the sum is read ahead of the norm")
    return terms


def _all_after(node: ir.Node, value: ir.Value) -> bool:
    """Whether nothing but the node reads the value ahead of the node."""
    graph = node.graph
    assert graph is not None
    readers = set(value.consumers()) - {node}
    for other in graph:
        if other is node:
            return all(reader.graph is graph for reader in readers)
        if other in readers:
            return False
    return False


def fused_operands(node: ir.Node) -> tuple[ir.Value, ir.Value, float]:
    """What a fused norm takes: x, gamma and epsilon.

    Raises:
        NotLegal: It normalises over more than the last axis.
    """
    x, gamma = required_input(node, 0), required_input(node, 1)
    epsilon = float_attribute(node, "epsilon", 1e-5)
    rank = len(dims(x))
    if int_attribute(node, "axis", -1) % rank != rank - 1:
        raise NotLegal("it normalises over more than the last axis")
    if epsilon <= 0:
        raise NotLegal(f"epsilon is {epsilon:g}")
    return x, gamma, epsilon


def _is_fixed(epsilon: float) -> bool:
    # FLOAT attributes are single precision: 1e-6 comes back as 9.99999997e-07.
    return math.isclose(epsilon, RMS_NORM_EPSILON, rel_tol=1e-6)


def rms_decomposed(op: Builder, node: ir.Node) -> Results:
    """RMSNormalization in standard operators, in the stash type (fp32) up to its one rounding."""
    x, gamma = required_input(node, 0), required_input(node, 1)
    dtype = _dtype(x)
    axis = int_attribute(node, "axis", -1) % len(dims(x))
    wide = op.cast(x, _stash_dtype(node, dtype))
    mean = op.mean(op.mul(wide, wide), axis)
    shifted = op.add(mean, float_attribute(node, "epsilon", 1e-5))
    normal = op.div(wide, op.unary("Sqrt", shifted))
    return (op.cast(op.mul(normal, _in(op, gamma, _dtype(wide))), dtype),)


def legalize_layer_normalization(op: Builder, node: ir.Node) -> Results:
    """LayerNormalization: ATC registers it at opsets 17 and 18 only.

    All of it is in the stash type (fp32), scale and bias too: y is rounded once, at the end, as by
    the kernels of other runtimes.
    """
    x, scale, bias = required_input(node, 0), required_input(node, 1), optional_input(node, 2)
    dtype = _dtype(x)
    axis = int_attribute(node, "axis", -1) % len(dims(x))
    wide = op.cast(x, _stash_dtype(node, dtype))
    mean = op.mean(wide, axis)
    centred = op.sub(wide, mean)
    variance = op.mean(op.mul(centred, centred), axis)
    deviation = op.unary("Sqrt", op.add(variance, float_attribute(node, "epsilon", 1e-5)))
    stash = _dtype(wide)
    y = op.mul(op.div(centred, deviation), _in(op, scale, stash))
    if bias is not None:
        y = op.add(y, _in(op, bias, stash))
    y = op.cast(y, dtype)
    inverse = op.unary("Reciprocal", deviation) if used_output(node, 2) else None
    return y, mean if used_output(node, 1) else None, inverse


def _in(op: Builder, weight: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A scale or a bias in another dtype: a constant is stored so, and no step casts it."""
    numbers = None if weight.dtype == dtype else constant(weight)
    return op.cast(weight, dtype) if numbers is None else op.constant(numbers, dtype)


def _dtype(x: ir.Value) -> ir.DataType:
    if x.dtype is None:
        raise NotLegal("the dtype of x is not known")
    return x.dtype


def _stash_dtype(node: ir.Node, dtype: ir.DataType) -> ir.DataType:
    return ir.DataType.FLOAT if int_attribute(node, "stash_type", 1) == 1 else dtype
