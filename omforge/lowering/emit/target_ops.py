"""The target ops that both fronts have (`ir.ops`) in GE's operators, as ATC's plugins make them."""

from __future__ import annotations

from collections.abc import Mapping

from omforge import ir
from omforge.air.ge_types import ge_number
from omforge.air.prototypes import prototype
from omforge.ir.ops import RMS_NORM_EPSILON, TARGET_OPS
from omforge.lowering.emit.emission import AttributeValue, Emission
from omforge.lowering.emit.standard import Emit

# What the plugin says although the node does not.
_FIXED: Mapping[str, Mapping[str, AttributeValue]] = {
    "NPURmsNorm": {"epsilon": RMS_NORM_EPSILON},
    "NPUAddRmsNorm": {"epsilon": RMS_NORM_EPSILON},
}


def _target_op(to: Emission, node: ir.Node) -> None:
    of = TARGET_OPS[node.op_type]
    operands = {
        slot.name: to.edge(value) for slot, value in zip(of.inputs, node.inputs, strict=False)
    }
    attributes: dict[str, AttributeValue] = dict(_FIXED.get(node.op_type, {}))
    ge = prototype(of.ge_type)
    for name, attribute in node.attributes.items():
        value = attribute.value
        value = value if isinstance(value, int | float | str) else attribute.as_string()
        slot = None if ge is None else ge.attribute(name)
        if slot is not None and slot.type == "Int" and isinstance(value, str):
            value = ge_number(value.lower())  # the plugin takes a dtype by its name
        attributes[name] = value
    to.add(of.ge_type, node.name or of.ge_type, operands, list(node.outputs), attributes)


def _weight_quant(to: Emission, node: ir.Node) -> None:
    """A weight [N, K] behind a Transpose is said by an attribute: GE fuses the two otherwise."""
    names = ("x", "weight", "antiquant_scale", "antiquant_offset")
    operands: dict[str, str] = {}
    turned = False
    for name, value in zip(names, node.inputs, strict=False):
        source = _turned(value)
        turned = turned or (name == "weight" and source is not None)
        operands[name] = to.edge(source or value)
    attributes: dict[str, AttributeValue] = {
        name: attribute.as_int() for name, attribute in node.attributes.items()
    }
    attributes["transpose_weight"] = turned
    of = TARGET_OPS[node.op_type]
    to.add(of.ge_type, node.name or of.ge_type, operands, list(node.outputs), attributes)


def _turned(value: ir.Value | None) -> ir.Value | None:
    """What a constant's Transpose of two axes reads; None where a value is no such."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "Transpose" or len(producer.inputs) != 1:
        return None
    source, perm = producer.inputs[0], producer.attributes.get("perm")
    if source is None or source.const_value is None or perm is None:
        return None
    return source if list(perm.as_ints()) == [1, 0] else None


def _quant_matmul(to: Emission, node: ir.Node) -> None:
    names = ("x1", "x2", "scale", "offset", "bias")
    operands = {name: to.edge(value) for name, value in zip(names, node.inputs, strict=False)}
    attributes: dict[str, AttributeValue] = {}
    for name, attribute in node.attributes.items():
        flag = name.startswith("transpose")
        attributes[name] = bool(attribute.as_int()) if flag else attribute.as_int()
    to.add("QuantBatchMatmulV3", node.name or "", operands, list(node.outputs), attributes)


TARGET: Mapping[str, Emit] = {
    **dict.fromkeys(TARGET_OPS, _target_op),
    "NPUWeightQuantBatchMatmulV2": _weight_quant,
    "QuantBatchMatMul": _quant_matmul,
}
"""By target op."""
