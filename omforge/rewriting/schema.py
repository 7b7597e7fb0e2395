"""What ONNX's own operator schemas say, cached: defaults, attribute names, input types.

Both sides of a rewrite ask here: the matcher for the default of an attribute that a pattern does
not mention, the builder for the type of an attribute or of a number given as an input.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
from onnx import defs

from omforge import ir
from omforge.ir.ops import TARGET_OPS
from omforge.ir.verify import RUNTIME_OPS

LATEST = defs.onnx_opset_version()

CONTRIB_DOMAIN = "com.microsoft"
"""Of ONNX Runtime's own operators."""


@cache
def find(op_type: str, domain: str, opset: int) -> defs.OpSchema | None:
    """Return the schema of an operator as of an opset, None where ONNX does not define it."""
    try:
        return defs.get_schema(op_type, opset, domain)
    except defs.SchemaError:
        return None


@cache
def defaults(op_type: str, domain: str, opset: int) -> Mapping[str, Any]:
    """Return the default of every attribute that has one.

    A name that is absent either has no default (Transpose's `perm`) or does not exist.
    """
    schema = find(op_type, domain, opset)
    if schema is None:
        return {}
    found = {name: _python(entry.default_value) for name, entry in schema.attributes.items()}
    return {name: value for name, value in found.items() if value is not None}


def _python(proto: onnx.AttributeProto) -> Any:
    match proto.type:
        case onnx.AttributeProto.INT:
            return proto.i
        case onnx.AttributeProto.FLOAT:
            return proto.f
        case onnx.AttributeProto.STRING:
            return proto.s.decode()
        case onnx.AttributeProto.INTS:
            return tuple(proto.ints)
        case _:
            return None  # no default, or of a type that no operator has a default of


@cache
def _attribute_names() -> Mapping[tuple[str, str], frozenset[str]]:
    names: dict[tuple[str, str], frozenset[str]] = {}
    for schema in defs.get_all_schemas_with_history():
        key = (schema.domain, schema.name)
        names[key] = names.get(key, frozenset()) | frozenset(schema.attributes)
    return names


def attribute_names(op_type: str, domain: str) -> frozenset[str] | None:
    """Return the attributes that an operator has had in any opset, None for an unknown operator."""
    return _attribute_names().get((domain, op_type))


@dataclass(frozen=True)
class Arity:
    """How many inputs and outputs an operator has had in any opset."""

    least_inputs: int
    most_inputs: int
    most_outputs: int


@cache
def arity(op_type: str, domain: str) -> Arity | None:
    """Return how many inputs and outputs a node can have, None for an unknown operator."""
    target = TARGET_OPS.get(op_type) if domain == "" else None
    if target is not None:
        return Arity(target.required_inputs, len(target.inputs), len(target.outputs))
    found = [
        schema
        for schema in defs.get_all_schemas_with_history()
        if (schema.domain, schema.name) == (domain, op_type)
    ]
    if not found:
        return None
    return Arity(
        min(schema.min_input for schema in found),
        max(schema.max_input for schema in found),
        max(schema.max_output for schema in found),
    )


def require_arity(op_type: str, takes: Arity, inputs: int, outputs: int) -> None:
    """Refuse a node of another number of inputs, or of too many outputs.

    Raises:
        TypeError: It is one.
    """
    if not takes.least_inputs <= inputs <= takes.most_inputs:
        most = f" to {takes.most_inputs}" if takes.most_inputs > takes.least_inputs else ""
        raise TypeError(f"{op_type} takes {takes.least_inputs}{most} inputs, and not {inputs}")
    if outputs > takes.most_outputs:
        raise TypeError(f"{op_type} has {takes.most_outputs} outputs, and not {outputs}")


@cache
def operators(domain: str) -> frozenset[str]:
    """Return the operators of a domain, in any opset; the target's among the default one's."""
    own = frozenset(name for place, name in _attribute_names() if place == domain)
    return own | frozenset(TARGET_OPS) | RUNTIME_OPS if own and domain == "" else own


def attribute_type(schema: defs.OpSchema | None, name: str) -> ir.AttributeType | None:
    """Return the type that a schema gives an attribute, None where it does not say."""
    if schema is None or name not in schema.attributes:
        return None
    # OpSchema.AttrType counts as AttributeProto does; its stub has neither value nor name.
    kind: Any = schema.attributes[name].type
    return ir.AttributeType(kind.value)


def input_types(schema: defs.OpSchema | None, count: int) -> list[tuple[str, frozenset[str]]]:
    """Return (type variable, allowed types such as `tensor(int64)`) of the first `count` inputs.

    A variadic last input is repeated; without a schema all inputs share one unconstrained variable.
    """
    if schema is None or not schema.inputs:
        return [("T", frozenset())] * count
    allowed = {t.type_param_str: frozenset(t.allowed_type_strs) for t in schema.type_constraints}
    formal = [(p.type_str, allowed.get(p.type_str, frozenset({p.type_str}))) for p in schema.inputs]
    return (formal + [formal[-1]] * count)[:count]


def output_types(schema: defs.OpSchema | None, count: int) -> list[str]:
    """Return the type variable, or the type, of the first `count` outputs.

    A variadic last output is repeated; without a schema there are none.
    """
    if schema is None or not schema.outputs:
        return []
    formal = [p.type_str for p in schema.outputs]
    return (formal + [formal[-1]] * count)[:count]
