"""What the tiling of fused attention refuses when a GE graph is compiled (E20001).

Only 310P's limits, which are the narrow ones. Sources: mirror-cann/ops-transformer:attention/
incre_flash_attention/op_host/incre_flash_attention_tiling_check.cpp and
attention/prompt_flash_attention/op_host/prompt_flash_attention_tiling.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from omforge.air.graph import Desc, Op
from omforge.air.names import by_slot, input_names
from omforge.air.prototypes import prototype
from omforge.atc.sim.air_kernels import Placed
from omforge.atc.sim.reports import Refused, Report

_ROWS, _LENGTH, _SIZE = 256, 65536, 512
_SHARED, _SHARED_SIZE = 32, 128


def check_tiling(placed: Iterable[Placed], family: str, report: Report) -> None:
    """Look for operators whose sizes no kernel can be tiled for.

    Raises:
        Refused: There is one.
    """
    if family != "310p":
        return
    failed = False
    for one in placed:
        find = _FAULTS.get(one.op.type)
        why = find(one) if find is not None else ""
        if why:
            report.inner(f"Compile node:{one.op.name}({one.op.type}) failed: {why}", "E20001")
            failed = True
    if failed:
        raise Refused


def _incre(one: Placed) -> str:
    query, key = _sizes(one, "query"), _sizes(one, "key")
    if query is None or key is None:
        return ""
    rows, heads, queries, size = query
    _, kv_heads, length, _ = key
    step = 32 if _input(one, "key").dtype == "int8" else 16
    if rows > _ROWS or length > _LENGTH:
        return f"batch {rows} must be at most {_ROWS}, the keys' {length} at most {_LENGTH}"
    if size % step or size > _SIZE:
        return f"the head size {size} must be a multiple of {step}, at most {_SIZE}"
    shared = heads // max(kv_heads, 1) * queries
    if shared > 1 and (shared > _SHARED or size > _SHARED_SIZE):
        return (
            f"heads and queries that share keys are {shared}, at most {_SHARED}; "
            f"their head size {size}, at most {_SHARED_SIZE}"
        )
    return ""


def _prompt(one: Placed) -> str:
    query, key = _sizes(one, "query"), _sizes(one, "key")
    if _input(one, "pse_shift").dtype != "undefined":
        return "310P takes no pse_shift"
    mask = _input(one, "atten_mask")
    if query is None or key is None:
        return ""
    if max(query[2], key[2]) > _LENGTH:
        return f"{max(query[2], key[2])} tokens must be at most {_LENGTH}"
    if mask.dtype == "undefined":
        return ""
    if mask.dtype != "bool":
        return f"the mask must be bool, it is {mask.dtype}"
    if query[2] != key[2] or query[2] % 16:
        return f"with a mask {query[2]} queries and {key[2]} keys must be one multiple of 16"
    return ""


_FAULTS: Mapping[str, Callable[[Placed], str]] = {
    "IncreFlashAttention": _incre,
    "PromptFlashAttention": _prompt,
}


def _input(one: Placed, name: str) -> Desc:
    of = prototype(one.op.type)
    places = by_slot(of.inputs, input_names(one.op)).get(name, []) if of is not None else []
    found = [one.inputs[at] for at in places if at < len(one.inputs)]
    return found[0] if found else Desc()


def _sizes(one: Placed, name: str) -> tuple[int, int, int, int] | None:
    """Batch, heads, tokens and head size; None where pages hide them, or the rank is another's."""
    shape = _input(one, name).shape
    if shape is None or _input(one, "block_table").dtype != "undefined":
        return None
    heads = _integer(one.op, "num_heads", 1)
    heads = heads if name == "query" else _integer(one.op, "num_key_value_heads", 0) or heads
    layout = _text(one.op, "input_layout", "BSH")
    if layout == "BSH" and len(shape) == 3:
        return shape[0], heads, shape[1], shape[2] // max(heads, 1)
    if len(shape) != 4:
        return None
    rows, second, third, size = shape
    return (rows, third, second, size) if layout == "BSND" else (rows, second, third, size)


def _integer(op: Op, name: str, default: int) -> int:
    attribute = op.attributes.get(name)
    value = None if attribute is None else attribute.value
    return value if isinstance(value, int) else default


def _text(op: Op, name: str, default: str) -> str:
    attribute = op.attributes.get(name)
    value = None if attribute is None else attribute.value
    return value if isinstance(value, str) else default
