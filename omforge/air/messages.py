"""The protobuf messages of package ge.proto, their descriptors made when this is imported.

Field names and numbers: hicann/ge:graph_metadef/proto/ge_ir.proto. What is not listed
here (attribute groups, the scheduler's own) stays in a message as unknown fields, and is written
again as it was.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "ge.proto"

LIMIT = (1 << 31) - 1
"""Bytes of a message that protobuf reads."""

# `*` is a repeated field, `{}` a map by name. Those of AttrDef are all members of one `oneof`.
_FIELDS = {
    "ModelDef": "name=1:string version=2:uint32 custom_version=3:string graph=7:*GraphDef "
    "attr=11:{}AttrDef",
    "GraphDef": "name=1:string input=4:*string output=5:*string op=6:*OpDef attr=11:{}AttrDef",
    "OpDef": "name=1:string type=2:string input=5:*string attr=10:{}AttrDef has_out_attr=20:bool "
    "id=21:int64 stream_id=22:int64 input_name=23:*string src_name=24:*string src_index=25:*int64 "
    "dst_name=26:*string dst_index=27:*int64 input_i=28:*int64 output_i=29:*int64 "
    "workspace=30:*int64 workspace_bytes=31:*int64 is_input_const=32:*bool "
    "input_desc=33:*TensorDescriptor output_desc=34:*TensorDescriptor subgraph_name=35:*string",
    "TensorDescriptor": "name=1:string dtype=2:int32 shape=3:ShapeDef layout=4:string "
    "attr=5:{}AttrDef has_out_attr=9:bool size=10:int64 weight_size=11:int64 reuse_input=12:bool "
    "output_tensor=13:bool device_type=14:string input_tensor=15:bool real_dim_cnt=16:int64 "
    "reuse_input_index=17:int64 data_offset=18:int64",
    "ShapeDef": "dim=1:*int64",
    "TensorDef": "desc=1:TensorDescriptor data=2:bytes",
    "AttrDef": "list=1:ListValue s=2:bytes i=3:int64 f=4:float b=5:bool bt=7:bytes "
    "func=10:NamedAttrs td=11:TensorDescriptor t=12:TensorDef g=13:GraphDef "
    "list_list_int=14:ListListInt dt=15:int64 list_list_float=16:ListListFloat expression=17:bytes",
    "ListValue": "s=2:*bytes i=3:*int64 f=4:*float b=5:*bool bt=7:*bytes td=8:*TensorDescriptor "
    "t=9:*TensorDef g=10:*GraphDef na=11:*NamedAttrs dt=12:*int64 val_type=20:int32",
    "NamedAttrs": "name=1:string attr=2:{}AttrDef",
    "ListListInt": "list_list_i=1:*ListInt",
    "ListInt": "list_i=1:*int64",
    "ListListFloat": "list_list_f=1:*ListFloat",
    "ListFloat": "list_f=1:*float",
}
_ONE_OF = "AttrDef"


@functools.lru_cache(maxsize=1)
def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="omforge/ge_ir.proto", package=PACKAGE, syntax="proto3"
    )
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        if name == _ONE_OF:
            message.oneof_decl.add(name="value")
        for field in fields.split():
            _add_field(message, field)
    pool = descriptor_pool.DescriptorPool()  # of our own: others may have GE's file in the default
    pool.Add(file)  # pyright: ignore[reportUnknownMemberType]
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in _FIELDS
    }


def _add_field(message: descriptor_pb2.DescriptorProto, text: str) -> None:
    kinds = descriptor_pb2.FieldDescriptorProto
    name, _, rest = text.partition("=")
    number, _, kind = rest.partition(":")
    field = message.field.add(name=name, number=int(number), label=kinds.LABEL_OPTIONAL)
    if kind.startswith("{}"):
        # A map is a repeated message of key and value, marked as one.
        entry = message.nested_type.add(name="".join(map(str.title, name.split("_"))) + "Entry")
        entry.options.map_entry = True
        _add_field(entry, "key=1:string")
        _add_field(entry, f"value=2:{kind[2:]}")
        field.label = kinds.LABEL_REPEATED
        field.type = kinds.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{message.name}.{entry.name}"
        return
    if kind.startswith("*"):
        kind = kind[1:]
        field.label = kinds.LABEL_REPEATED
    if kind in _FIELDS:
        field.type = kinds.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"
    else:
        field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    if message.name == _ONE_OF:
        field.oneof_index = 0


def new(name: str) -> Any:
    """Return an empty message of that name."""
    return _classes()[name]()
