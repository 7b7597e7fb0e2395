"""A damaged model is refused by an error that says what it is, or it is no longer damaged.

Seeded edits of one field of a real export's message, and of its bytes: whatever comes of them, no
command ends in an exception of a library's, or of ours that was not meant.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from omforge import ir
from omforge.lowering.legality import check_file
from omforge.lowering.target import target
from omforge.passes import make_pipeline

Exported = Callable[[str, str], Path]

SEEDS = range(45)
NUMBERS = (0, 1, -1, 3, -7, 99, 1 << 31, (1 << 63) - 1, -(1 << 63))
WORDS = ("", "\x1b[31m", "Add", "If", "Constant", "9**9**9", "input_ids", "../x")
_INTEGERS = (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64)
_FLOATS = (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE)


def fields(message: Any) -> Iterator[tuple[Any, Any]]:
    """Every field that is set, at any depth, with the message that it is in."""
    for field, value in message.ListFields():
        yield message, field
        if isinstance(value, Message):
            yield from fields(value)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for each in value:
                yield from fields(each)


def other(random: Random, field: Any, old: Any) -> Any:
    """A value of the field's type."""
    if field.type in _INTEGERS:
        least, most = (0, (1 << 63) - 1) if field.type == _INTEGERS[2] else (-(1 << 63), 1 << 62)
        bound = (1 << 31) - 1 if field.type == _INTEGERS[0] else most
        return max(least, -bound - 1, min(bound, random.choice((*NUMBERS, old + 1, old * 2))))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return random.choice([value.number for value in field.enum_type.values])
    if field.type in _FLOATS:
        return random.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return random.choice((old[:-1], old + b"\0", b"\xff", b""))
    return random.choice((*WORDS, f"{old}_"))


def damage(random: Random, message: onnx.ModelProto) -> str:
    """Edit one field, of a kind that is drawn first: most fields are names."""
    kinds: dict[tuple[str, str], list[tuple[Any, Any]]] = defaultdict(list)
    for holder, field in fields(message):
        kinds[(holder.DESCRIPTOR.name, field.name)].append((holder, field))
    kind = random.choice(sorted(kinds))
    holder, field = random.choice(kinds[kind])
    value = getattr(holder, field.name)
    if hasattr(value, "append"):  # a repeated field
        index, draw = random.randrange(len(value)), random.random()
        if draw < 0.4:
            del value[index]
        elif draw < 0.6 or field.type == FieldDescriptor.TYPE_MESSAGE:
            value.append(value[index])
        else:
            value[index] = other(random, field, value[index])
    elif isinstance(value, Message) or random.random() < 0.3:
        holder.ClearField(field.name)
    else:
        setattr(holder, field.name, other(random, field, value))
    return ".".join(kind)


def cut(random: Random, content: bytes) -> bytes:
    """Other bytes: one bit, or an end that is missing."""
    at = random.randrange(len(content))
    if random.random() < 0.3:
        return content[:at]
    return content[:at] + bytes((content[at] ^ 1 << random.randrange(8),)) + content[at + 1 :]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_model_is_read_or_refused(exported: Exported, tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    content = exported("genai", "llama_gqa").read_bytes()
    if seed % 9 == 8:
        content = cut(random, content)
    else:
        message = onnx.ModelProto.FromString(content)
        damage(random, message)
        content = message.SerializeToString()
    file = tmp_path / "m.onnx"
    file.write_bytes(content)
    for command in (
        lambda: make_pipeline("raise").run(ir.load(file)),
        lambda: check_file(file, target("Ascend310P3")),
    ):
        try:
            command()
        except ir.OmforgeError as error:
            assert error.what  # noqa: PT017  any error that was meant will do, and many are right
