"""Rules for attributes: they are there, of the right kind, and of values that the kernel takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from omforge.air.ge_types import ge_dtype
from omforge.air.graph import CONST_TYPES, NET_OUTPUT, Attr
from omforge.air.names import BOOKKEEPING
from omforge.air.prototypes import Attribute
from omforge.air.show import value as shown
from omforge.lowering.air_legality.kernel_table import kernel_for
from omforge.lowering.air_legality.subject import AirSubject, Call
from omforge.lowering.legality.subject import Finding, Rule

_KINDS: Mapping[str, str] = {
    "Int": "i", "Float": "f", "Bool": "b", "String": "s", "Type": "dt", "Tensor": "t",
    "ListInt": "i", "ListFloat": "f", "ListBool": "b", "ListString": "s", "ListType": "dt",
}  # fmt: skip
"""The field of AttrDef, or of its list, that holds a value of each type; ListListInt is raw."""

_WORDS = {
    "s": "text", "i": "int", "f": "float", "b": "bool", "bt": "bytes", "dt": "dtype",
    "td": "a description", "t": "a tensor", "raw": "another kind",
}  # fmt: skip

DTYPE_ATTRIBUTES: Mapping[str, tuple[str, str]] = {
    "Cast": ("dst_type", "y"),
    "AscendQuant": ("dst_type", "y"),
    "AscendQuantV2": ("dst_type", "y"),
    "AscendAntiQuantV2": ("dst_type", "y"),
    "AscendDequant": ("dtype", "y"),
    "AscendAntiQuant": ("dtype", "y"),
    "DynamicQuant": ("dst_type", "y"),
    "DynamicQuantV2": ("dst_type", "y"),
    "GroupQuant": ("dst_type", "y"),
    "QuantBatchMatmulV3": ("dtype", "y"),
    "Shape": ("dtype", "y"),
    "ShapeN": ("dtype", "y"),
    "Size": ("dtype", "y"),
    "Eye": ("dtype", "y"),
    "ArgMaxV2": ("dtype", "y"),
    "FileConstant": ("dtype", "y"),
}
"""Attributes that are GE's number of a dtype, and the output that has it."""


def required_attributes_are_there(subject: AirSubject) -> Iterator[Finding]:
    """Whatever attribute the prototype requires is there."""
    for call, attribute, given in _attributes(subject):
        if attribute.required and given is None:
            yield Finding(
                call.where,
                f"the attribute {attribute.name} is missing",
                f"it is a required {attribute.type}",
                "write it",
            )


def attributes_are_of_their_kind(subject: AirSubject) -> Iterator[Finding]:
    """An attribute is stored as the kind of value that the prototype says."""
    for call, attribute, given in _attributes(subject):
        kind = _KINDS.get(attribute.type)
        if kind is None or given is None or (given.kind == "raw" and _is_list(attribute)):
            continue
        name = attribute.name
        if given.kind == "none":
            yield Finding(call.where, f"the attribute {name} has no value", "", "write one")
        elif given.kind != kind or (given.items is not None) != _is_list(attribute):
            yield Finding(
                call.where,
                f"the attribute {name} is {_words(given.kind, given.items is not None)}",
                f"the operator reads a {attribute.type}, and finds none",
                f"store {_words(kind, _is_list(attribute))}",
            )


def lists_are_typed(subject: AirSubject) -> Iterator[Finding]:
    """A list says the type of its items (val_type), an empty one too."""
    for call in subject.calls:
        names = [name for name in call.op.attributes if _is_dropped(call, name)]
        for at, desc in (*enumerate(call.op.input_desc), *enumerate(call.op.output_desc)):
            names += [
                f"{name} of {desc.name or at}"
                for name, given in desc.attributes.items()
                if not given.typed
            ]
        for name in names:
            yield Finding(
                call.where,
                f"the list {name} does not say what it holds",
                "without val_type a list is dropped",
                "set val_type",
            )


def _is_dropped(call: Call, name: str) -> bool:
    """Whether an attribute is a list without a type, or of several, and not one read untyped."""
    if call.op.type in CONST_TYPES or name in (*BOOKKEEPING, *_RECOVERED, *_BESIDE):
        return False  # constants have rules of their own
    given = call.op.attributes[name]
    attribute = None if call.prototype is None else call.prototype.attribute(name)
    listed = attribute is not None and _is_list(attribute) and attribute.type in _KINDS
    return not given.typed or (given.kind == "raw" and listed)


def numbers_of_dtypes_are_right(subject: AirSubject) -> Iterator[Finding]:
    """An attribute that names a dtype holds GE's number of it, which is the output's dtype."""
    for call in subject.calls:
        name, output = DTYPE_ATTRIBUTES.get(call.op.type, ("", ""))
        given = call.op.attributes.get(name)
        if given is None or given.kind not in ("i", "dt") or given.items is not None:
            continue
        said = ge_dtype(given.value) if isinstance(given.value, int) else str(given.value)
        stated = call.result(output).dtype
        if said.startswith("ge:") or said == "undefined":
            yield Finding(
                call.where,
                f"{name} is {given.value}",
                "no dtype has that number",
                "see ge::DataType",
            )
        elif stated is not None and stated != said:
            yield Finding(
                call.where,
                f"{name} is {said}, the output {output} {stated}",
                "attributes hold ge::DataType, whose numbers are not those of descriptions",
                "make them one dtype",
            )


def values_are_allowed(subject: AirSubject) -> Iterator[Finding]:
    """An attribute has a value that the SoC's kernel allows."""
    for call in subject.calls:
        kernel, note = kernel_for(call.op.type, subject.target)
        for attribute in () if kernel is None else kernel.attributes:
            given = call.op.attributes.get(attribute.name)
            allowed = attribute.allowed.split(",")
            if attribute.allowed in ("", "all") or attribute.type.startswith("list"):
                continue
            if given is None or given.items is not None or given.kind not in ("i", "f", "b", "s"):
                continue
            if not any(_same(given, value) for value in allowed):
                yield Finding(
                    call.where,
                    f"{attribute.name} is {shown(given)}",
                    f"its kernel allows {', '.join(allowed)}{note}",
                    "take one of them",
                )


def attributes_are_read(subject: AirSubject) -> Iterator[Finding]:
    """An attribute is one of the operator's own."""
    for call in subject.calls:
        if call.prototype is None:
            continue
        for name in call.op.attributes:
            private = name.startswith("_") or call.op.type in CONST_TYPES
            if not private and call.prototype.attribute(name) is None:
                yield Finding(
                    call.where,
                    f"{call.op.type} of CANN 8.1.RC1 has no attribute {name}",
                    "it is kept and not read",
                    "leave it out",
                )


_RECOVERED: Mapping[str, str] = {
    "_ir_inputs_key": "inputs",
    "_ir_outputs_key": "outputs",
    "_ir_attr_names": "attributes",
}
_BESIDE = ("_ir_inputs_value", "_ir_outputs_value", "_opt_input")


def recovery_is_left_to_ge(subject: AirSubject) -> Iterator[Finding]:
    """What GE recovers from the prototype is not written, or is as CANN 8.1.RC1 has it."""
    for call in subject.calls:
        for name, side in _RECOVERED.items():
            if call.prototype is None or name not in call.op.attributes:
                continue
            wanted = [item.name for item in getattr(call.prototype, side)]
            given = list(call.op.attributes[name].items or ())
            common = min(len(given), len(wanted))
            if given[:common] == wanted[:common]:
                yield Finding(
                    call.where,
                    f"it says {name}",
                    "where another release's prototype differs, the file is refused",
                    "leave it out: GE fills it in",
                    level="advice",
                )
            else:
                yield Finding(
                    call.where,
                    f"{name} is {', '.join(map(str, given))}",
                    f"the prototype has {', '.join(wanted)}",
                    "leave it out: GE fills it in",
                )


def _attributes(subject: AirSubject) -> Iterator[tuple[Call, Attribute, Attr | None]]:
    """The attributes of every prototype, with what is given."""
    for call in subject.calls:
        if call.prototype is None or call.op.type in (*CONST_TYPES, NET_OUTPUT):
            continue
        for attribute in call.prototype.attributes:
            yield call, attribute, call.op.attributes.get(attribute.name)


def _is_list(attribute: Attribute) -> bool:
    return attribute.type.startswith("List")


def _words(kind: str, is_list: bool) -> str:
    word = _WORDS.get(kind, kind)
    return f"a list of {word}" if is_list else word


def _same(given: Attr, value: str) -> bool:
    if given.kind == "s":
        return given.value == value
    if given.kind == "b":
        return str(given.value).lower() == value.lower()
    try:
        return float(given.value) == float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


_INC = "CANN 8.1.RC1:opp/built-in/op_proto/inc"
_LOADER = "hicann/ge:graph_metadef/graph/serialization/model_serialize.cc"
_INFO = "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config"

RULES = (
    Rule(
        "air-required-attributes",
        "it is loaded; EZ9999 in inference or tiling, or never",
        _INC,
        required_attributes_are_there,
        certainty="seen",
    ),
    Rule(
        "air-attribute-kinds",
        "it is loaded, and the default is taken",
        f"{_INC}; {_LOADER}",
        attributes_are_of_their_kind,
    ),
    Rule(
        "air-list-types",
        "it is loaded, and the attribute dropped without a word",
        f"{_LOADER} (DeserializeAllAttrsToAttrHolder)",
        lists_are_typed,
        certainty="seen",
    ),
    Rule(
        "air-attribute-dtypes",
        "another dtype than the file says, or EZ9999",
        "hicann/ge:graph_metadef/graph/serialization/data_type_serializer.cc",
        numbers_of_dtypes_are_right,
    ),
    Rule("air-attribute-values", "EZ3003, or EZ9999 in tiling", _INFO, values_are_allowed),
    Rule(
        "air-attributes-read",
        "it is loaded, and the attribute ignored",
        _INC,
        attributes_are_read,
        certainty="seen",
        level="advice",
    ),
    Rule(
        "air-ir-attributes",
        "E19999: Compatibility failed, where their order is not the installed one",
        "hicann/ge:graph_metadef/graph/ir/ir_definitions_recover.cc",
        recovery_is_left_to_ge,
        certainty="seen",
    ),
)
