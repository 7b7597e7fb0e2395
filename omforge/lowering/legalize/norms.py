"""RMSNormalization to NPURmsNorm, LayerNormalization to the operators of opset 16."""

from __future__ import annotations

import math

from omforge import ir
from omforge.ir.ops import RMS_NORM_EPSILON
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    dims,
    float_attribute,
    int_attribute,
    optional_input,
    required_input,
    used_output,
)


def legalize_rms_normalization(op: Builder, node: ir.Node) -> None:
    """Replace one RMSNormalization (opset 23).

    ATC's plugin ignores epsilon and always uses 1e-6
    (hicann/ops-nn:norm/rms_norm/framework/npu_rms_norm_onnx_plugin.cpp), so another epsilon has x
    scaled first. With s = sqrt(1e-6 / epsilon)::

        s*x / sqrt(mean((s*x)^2) + 1e-6)  =  x / sqrt(mean(x^2) + epsilon)
    """
    x, gamma = required_input(node, 0), required_input(node, 1)
    epsilon = float_attribute(node, "epsilon", 1e-5)
    rank = len(dims(x))
    last_axis_only = int_attribute(node, "axis", -1) % rank == rank - 1
    if not last_axis_only or not op.target.has("NPURmsNorm") or epsilon <= 0:
        op.commit(_decomposed_rms(op, node, x, gamma, epsilon))
        return
    dtype = x.dtype
    assert dtype is not None
    # FLOAT attributes are single precision: 1e-6 comes back as 9.99999997e-07.
    exact = math.isclose(epsilon, RMS_NORM_EPSILON, rel_tol=1e-6)
    scale = 1.0 if exact else math.sqrt(RMS_NORM_EPSILON / epsilon)
    # A scale above 1 (epsilon below 1e-6) may overflow fp16; below 1 nothing can.
    wide = ir.DataType.FLOAT if scale > 1 else dtype
    scaled = op.mul(op.cast(x, wide), scale)
    # x and gamma of one dtype: 310P takes no other.
    weight = op.cast(op.reshape(gamma, dims(x)[-1:]), wide)
    op.commit(op.cast(op.target_op("NPURmsNorm", scaled, weight), dtype))


def _decomposed_rms(
    op: Builder, node: ir.Node, x: ir.Value, gamma: ir.Value, epsilon: float
) -> ir.Value:
    dtype = x.dtype
    assert dtype is not None
    axis = int_attribute(node, "axis", -1) % len(dims(x))
    wide = op.cast(x, _stash_dtype(node, dtype))
    mean = op.mean(op.mul(wide, wide), axis)
    normal = op.div(wide, op.unary("Sqrt", op.add(mean, float(epsilon))))
    return op.mul(op.cast(normal, dtype), op.cast(gamma, dtype))


def legalize_layer_normalization(op: Builder, node: ir.Node) -> None:
    """Replace one LayerNormalization: ATC registers it at opsets 17 and 18 only.

    The mean and the variance are taken in the stash type (fp32), scale and bias in x's.
    """
    x, scale, bias = required_input(node, 0), required_input(node, 1), optional_input(node, 2)
    dtype = x.dtype
    if dtype is None:
        raise NotLegal("the dtype of x is not known")
    axis = int_attribute(node, "axis", -1) % len(dims(x))
    wide = op.cast(x, _stash_dtype(node, dtype))
    mean = op.mean(wide, axis)
    centred = op.sub(wide, mean)
    variance = op.mean(op.mul(centred, centred), axis)
    deviation = op.unary("Sqrt", op.add(variance, float_attribute(node, "epsilon", 1e-5)))
    y = op.mul(op.cast(op.div(centred, deviation), dtype), op.cast(scale, dtype))
    if bias is not None:
        y = op.add(y, op.cast(bias, dtype))
    inverse = op.unary("Reciprocal", deviation) if used_output(node, 2) else None
    op.commit(y, mean if used_output(node, 1) else None, inverse)


def _stash_dtype(node: ir.Node, dtype: ir.DataType) -> ir.DataType:
    return ir.DataType.FLOAT if int_attribute(node, "stash_type", 1) == 1 else dtype
