"""Which engine takes an operator of a GE graph: AI Core, AI CPU, GE itself, or none (EZ3003).

Source of the choice: hicann/ge:compiler/graph/manager/util and engines (engine_place.cc); of the AI
Core kernels `omforge/air/data/kernels.tsv`, CANN 8.1.RC1's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from omforge.air.graph import Desc, Op
from omforge.air.kernels import Kernel, KernelSlot, kernel, listed
from omforge.air.names import by_slot, input_names, output_names
from omforge.air.prototypes import prototype
from omforge.atc.sim.reports import Refused, Report

# hicann/ge:compiler/engines/local_engine/ops_kernel_store/op (REGISTER_OP_CREATOR)
_GE_ITSELF = frozenset(
    (
        *("Data", "RefData", "Const", "Constant", "FileConstant", "NetOutput", "NoOp"),
        *("Reshape", "Squeeze", "SqueezeV2", "SqueezeV3", "Unsqueeze", "UnsqueezeV2"),
        *("UnsqueezeV3", "ExpandDims", "Flatten", "FlattenV2", "ReFormat", "TransShape"),
        *("Identity", "IdentityN", "Shape", "ShapeN", "Size", "Rank", "Bitcast"),
    )
)
# hicann/ops-math and hicann/ops-nn: op_kernel_aicpu
_AI_CPU = frozenset(
    (
        *("Add", "Cast", "Cumsum", "Div", "Equal", "Exp", "GatherV2", "Greater", "Less", "Log"),
        *("LogSoftmaxV2", "Mul", "Neg", "Pow", "RealDiv", "ReduceMean", "ReduceSum", "Round"),
        *("Rsqrt", "ScatterElements", "SelectV2", "SoftmaxV2", "SplitD", "SplitV", "Sqrt"),
        *("StridedSlice", "StridedSliceV2", "Sub", "TensorScatterUpdate", "Tile", "Where"),
        *("Range", "NotEqual", "GreaterEqual", "TopKV2D", "Unpack", "Acos", "Asin", "Atan"),
    )
)
_SOCS = {
    "Ascend310P": "310p",
    "Ascend310B": "310b",
    "Ascend910B": "910b",
    "Ascend910_93": "910_93",
}
"""What a SoC's name begins with, and the family of its table."""

_ANY_PRECISION = ("origin", "must_keep_origin_dtype")
_FLOATS = frozenset(("float16", "float32", "bfloat16"))


@dataclass(frozen=True)
class Placed:
    """An operator with what goes in and comes out, as inference has it."""

    op: Op
    inputs: tuple[Desc, ...]
    outputs: tuple[Desc, ...]


def family_of(soc: str) -> str:
    """The family whose kernels are known, "" for a SoC without a table."""
    found = (family for start, family in _SOCS.items() if soc.startswith(start))
    return "" if soc == "Ascend910B" else next(found, "")


def check_kernels(placed: Iterator[Placed], family: str, precision: str, report: Report) -> None:
    """Choose an engine for each operator.

    Args:
        placed: The operators.
        family: Of the SoC; one without a table is not checked.
        precision: --precision_mode_v2: whether GE may cast floats to fit a kernel.
        report: Takes what is wrong.

    Raises:
        Refused: One has no kernel, or none for its dtypes.
    """
    slow: list[str] = []
    missing: list[str] = []
    for one in placed:
        fault = _fault(one, family, keeps=precision in _ANY_PRECISION)
        if fault and one.op.type in _AI_CPU:
            slow.append(f"{one.op.name} ({one.op.type})")
        elif fault:
            missing.append(f"{one.op.name}, optype [{one.op.type}]: {fault}")
    if slow:
        report.note("SIM083", f"on the AI CPU, slowly: {', '.join(slow)}.")
    for text in missing:
        report.inner(f"No supported Ops kernel and engine are found for [{text}].", "EZ3003")
    if missing:
        raise Refused


def check_types(ops: Iterable[Op], family: str, report: Report) -> None:
    """Check that there is an engine at all for each operator, whatever its dtypes.

    Raises:
        Refused: One has none.
    """
    check_kernels((Placed(op, (), ()) for op in ops), family, "", report)


def _fault(one: Placed, family: str, *, keeps: bool) -> str:
    """Say why AI Core does not take an operator, "" where it or GE itself does."""
    op_type = one.op.type
    if op_type in _GE_ITSELF:
        return ""
    if prototype(op_type) is None:
        return "no such operator is registered"
    found = kernel(op_type, family)
    if found is None:
        return "no kernel" if listed(op_type) and _has_table(family) else ""
    wanted = list(_wanted(one, found))
    width = max((len(slot.dtypes) for slot, _ in wanted), default=0)
    if not width or any(_fits(wanted, at, keeps=keeps) for at in range(width)):
        return ""
    return f"no kernel takes {', '.join(f'{slot.name} {dtype}' for slot, dtype in wanted)} together"


def _has_table(family: str) -> bool:
    return kernel("Add", family) is not None


def _wanted(one: Placed, found: Kernel) -> Iterator[tuple[KernelSlot, str]]:
    of = prototype(one.op.type)
    if of is None:
        return
    sides = (
        (of.inputs, found.inputs, input_names(one.op), one.inputs),
        (of.outputs, found.outputs, output_names(one.op), one.outputs),
    )
    for slots, kernel_slots, names, descs in sides:
        places: Mapping[str, list[int]] = by_slot(slots, names)
        for slot, kernel_slot in zip(slots, kernel_slots, strict=False):
            for at in places.get(slot.name, []):
                dtype = descs[at].dtype if at < len(descs) else "undefined"
                if dtype != "undefined" and kernel_slot.dtypes:
                    yield kernel_slot, dtype


def _fits(wanted: list[tuple[KernelSlot, str]], at: int, *, keeps: bool) -> bool:
    for slot, dtype in wanted:
        if at >= len(slot.dtypes):
            return False
        same = slot.dtypes[at] == dtype
        cast = not keeps and {slot.dtypes[at], dtype} <= _FLOATS
        if not same and not cast:
            return False
    return True
