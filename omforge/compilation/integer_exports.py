"""Exports whose products were made integer ones by ONNX Runtime's quantiser."""

from __future__ import annotations

from pathlib import Path

from omforge import ir

_DYNAMIC = frozenset(
    (
        *("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"),
        *("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM"),
    )
)
_STATIC = frozenset(
    ("QLinearMatMul", "QLinearConv", "QGemm", "QAttention", "QEmbedLayerNormalization")
)


def require_float_products(model: ir.Model, file: Path) -> None:
    """Refuse operators that multiply integers: they have no canonical form, and ATC no kernel.

    Raises:
        InputError: There are such; it says what they are and how to have an int8 bundle.
    """
    found = [
        node
        for graph in ir.all_graphs(model)
        for node in graph
        if node.op_type in _DYNAMIC | _STATIC
    ]
    if not found:
        return
    dynamic = any(node.op_type in _DYNAMIC for node in found)
    how = "what its layers read is made int8 at every step" if dynamic else "its layers read int8"
    kinds = ", ".join(dict.fromkeys(node.op_type for node in found))
    raise ir.InputError(
        f"{file} is quantised {'dynamically' if dynamic else 'statically'}",
        f"{how} ({len(found)} nodes: {kinds}; the first is {ir.describe(found[0])}), "
        "which ATC has no kernels for",
        "Compile the float export with --quantize int8, or w8a8 for int8 products",
    )
