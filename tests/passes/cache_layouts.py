"""`Block` models whose cache an exporter laid out in another way than [B, K, P, D]."""

from __future__ import annotations

from tests.passes.blocks import Block

K, D = 2, 4
_NUMBERS = {"K": K, "D": D, "KD": K * D, "1": 1}
_DTYPES = {"float": 1, "float16": 10}


def _shape(axes: list[str], tokens: str) -> str:
    names = {"B": "batch", "P": tokens, "BK": "rows"}
    return ", ".join(names.get(axis) or str(_NUMBERS[axis]) for axis in axes)


def _target(name: str, axes: list[str], length: str) -> str:
    """Nodes that make `name`, what Reshape takes for these axes; P is as long as `length` says."""
    parts = [length if axis == "P" else f"{name}_{i}" for i, axis in enumerate(axes)]
    constants = [
        f"{part} = Constant <value_ints = [{_NUMBERS.get(axis, -1)}]> ()"
        for part, axis in zip(parts, axes, strict=True)
        if axis != "P"
    ]
    return f"{' '.join(constants)} {name} = Concat <axis = 0> ({', '.join(parts)})"


def laid_out(keys: str, values: str, dtype: str = "float") -> str:
    """A block whose keys and values are laid out as the letters of each axis say.

    Args:
        keys: Such as "P B K D" or "BK D P"; 1 is an axis of one.
        values: So.
        dtype: Of the cache; other than float, it is cast at the border.
    """
    text = Block().text()
    for role, name, spelled in (("key", "k4", keys), ("value", "v4", values)):
        axes = spelled.split()
        letters = [letter for letter in "".join(axes) if letter != "1"]
        grows = axes.index("P")
        text = text.replace(
            f"present_{role} = Concat <axis = 2> (past_{role}, {name})",
            f"""{role}_moved = Transpose <perm = {["BKPD".index(x) for x in letters]}> ({name})
            {role}_seq = Shape <start = 2, end = 3> ({name})
            {_target(f"{role}_joined", axes, f"{role}_seq")}
            {role}_new = Reshape ({role}_moved, {role}_joined)
            {role}_past = Cast <to = 1> (past_{role})
            {role}_whole = Concat <axis = {grows}> ({role}_past, {role}_new)
            present_{role} = Cast <to = {_DTYPES[dtype]}> ({role}_whole)
            {role}_total = Shape <start = {grows}, end = {grows + 1}> ({role}_whole)
            {_target(f"{role}_split", letters, f"{role}_total")}
            {role}_parts = Reshape ({role}_whole, {role}_split)
            whole_{role} = Transpose <perm = {[letters.index(x) for x in "BKPD"]}> ({role}_parts)
            """,
        )
        text = text.replace(f"(present_{role}, ", f"(whole_{role}, ")
        for side, tokens in (("past", "past"), ("present", "total")):
            text = text.replace(
                f"float[batch, {K}, {tokens}, {D}] {side}_{role}",
                f"{dtype}[{_shape(axes, tokens)}] {side}_{role}",
            )
        if role == "key":
            read = "Shape <start = 2, end = 3> (past_key)"
            text = text.replace(read, f"Shape <start = {grows}, end = {grows + 1}> (past_key)")
    return text


def in_one_tensor(shape: str, parts: tuple[str, str], give: str, length: int) -> str:
    """A block whose keys and values are parts of one input `cache`, and of one output `renewed`.

    Args:
        shape: Of the cache, with `past` where it grows.
        parts: Nodes that take `past_key` and `past_value`, [B, K, P, D] each, out of `cache`.
        give: Nodes that make `renewed` of `present_key` and `present_value`, or of `k4` and `v4`.
        length: The axis of the cache that grows.
    """
    text = Block().text()
    for index, role in enumerate(("key", "value")):
        text = text.replace(f", float[batch, 2, past, 4] past_{role}", "")
        text = text.replace(f", float[batch, 2, total, 4] present_{role}", "")
        text = text.replace(f"present_{role} = Concat", f"{parts[index]}\npresent_{role} = Concat")
    text = text.replace("position_ids)", f"position_ids, float[{shape}] cache)", 1)
    grown = shape.replace("past", "renewed_length")
    text = text.replace("] logits)", f"] logits, float[{grown}] renewed)", 1)
    read = "Shape <start = 2, end = 3> (past_key)"
    text = text.replace(read, f"Shape <start = {length}, end = {length + 1}> (cache)")
    return text.replace("logits = MatMul (hidden, head)", f"logits = MatMul (hidden, head)\n{give}")


def slices(axis: int, squeeze: bool = False) -> tuple[str, str]:
    """The first half of `cache` along an axis, and the second."""
    made: list[str] = []
    for index, role in enumerate(("key", "value")):
        size = 1 if squeeze else 2
        out = f"{role}_part" if squeeze else f"past_{role}"
        text = (
            f"{role}_at = Constant <value_ints = [{index * size}]> ()"
            f" {role}_to = Constant <value_ints = [{(index + 1) * size}]> ()"
            f" {role}_on = Constant <value_ints = [{axis}]> ()"
            f" {out} = Slice (cache, {role}_at, {role}_to, {role}_on)"
        )
        made.append(f"{text} past_{role} = Squeeze ({out}, {role}_on)" if squeeze else text)
    return made[0], made[1]


def transposed(parts: tuple[str, str]) -> tuple[str, str]:
    """The same of a `cache` [B, P, 2*K, D]."""
    key, value = (
        text.replace(f"past_{role} = Slice", f"{role}_part = Slice")
        + f" past_{role} = Transpose <perm = [0, 2, 1, 3]> ({role}_part)"
        for text, role in zip(parts, ("key", "value"), strict=True)
    )
    return key, value


def stacked(axis: int) -> str:
    """Nodes that stack present keys and values along a new axis."""
    return (
        f"on = Constant <value_ints = [{axis}]> () uk = Unsqueeze (present_key, on)"
        f" uv = Unsqueeze (present_value, on) renewed = Concat <axis = {axis}> (uk, uv)"
    )


ROWS = "both = Concat <axis = 1> ({}, {}) renewed = Transpose <perm = [0, 2, 1, 3]> (both)"
"""Nodes that make rows [B, T, K, D] of two tensors [B, K, T, D]; for `str.format`."""
