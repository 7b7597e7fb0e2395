"""Rules for dtypes and formats: a kernel of the SoC takes what is connected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from omforge.air.kernels import Kernel, KernelSlot
from omforge.air.prototypes import Slot
from omforge.lowering.air_legality.kernel_table import (
    LOCAL,
    ON_THE_CPU,
    has_none,
    is_inferred,
    is_newer,
    kernel_for,
)
from omforge.lowering.air_legality.subject import AirSubject, Body, Call, Operand, Result
from omforge.lowering.legality.subject import Finding, Rule

_CPU = "; the AI CPU has one, which may take it, slowly"

Tensors = Mapping[str, Sequence[Operand | Result]]


def dtypes_are_the_target_s(subject: AirSubject) -> Iterator[Finding]:
    """A tensor has a dtype that the SoC has."""
    allowed = subject.target.dtypes | {"undefined", "string", "float64"}
    for call in subject.calls:
        for desc in call.op.output_desc:
            if desc.dtype not in allowed:
                yield Finding(
                    call.where,
                    f"it makes a tensor of {desc.dtype}",
                    f"{subject.target.soc_version} has {', '.join(sorted(subject.target.dtypes))}",
                    "take one of them",
                )
                break


def kernels_are_there(subject: AirSubject) -> Iterator[Finding]:
    """The SoC has a kernel for the operator."""
    if not is_inferred(subject.target):
        yield from _kernelless(subject)


def kernels_are_inferred(subject: AirSubject) -> Iterator[Finding]:
    """The family that comes nearest has a kernel for the operator."""
    if is_inferred(subject.target):
        yield from _kernelless(subject)


def _kernelless(subject: AirSubject) -> Iterator[Finding]:
    for call in subject.calls:
        newer = is_newer(call.op.type, subject.target)  # which is another rule's
        if not newer and has_none(call.op.type, subject.target):
            _, note = kernel_for(call.op.type, subject.target)
            slow = call.op.type in ON_THE_CPU
            yield Finding(
                call.where,
                f"{subject.target.family.name} has no kernel for {call.op.type}",
                f"its operator table names none{note}{_CPU if slow else ''}",
                "use operators that it has",
                atc="" if slow else None,
                level="advice" if slow else None,
            )


def dtypes_are_one_combination(subject: AirSubject) -> Iterator[Finding]:
    """The dtypes of what is connected are one column of the kernel's table."""
    if not is_inferred(subject.target):
        yield from _uncombined(subject)


def dtypes_are_an_inferred_combination(subject: AirSubject) -> Iterator[Finding]:
    """The dtypes are one column of the table of the family that comes nearest."""
    if is_inferred(subject.target):
        yield from _uncombined(subject)


def _uncombined(subject: AirSubject) -> Iterator[Finding]:
    for call in subject.calls:
        kernel, note = kernel_for(call.op.type, subject.target)
        if kernel is None or not call.named or _foreign(call, subject):
            continue
        wanted = dict(_connected(call, kernel))
        columns = {len(slot.dtypes) for slot, _ in wanted.values() if slot.dtypes}
        if not columns:
            continue
        width = max(columns)
        if any(_column(wanted, at) for at in range(width)):
            continue
        told = ", ".join(f"{name} {dtype}" for name, (_, dtype) in wanted.items())
        slow = call.op.type in ON_THE_CPU
        yield Finding(
            call.where,
            f"no kernel takes these dtypes together: {told}",
            f"the nearest is {_nearest(wanted, width)}{note}{_CPU if slow else ''}",
            "cast what differs",
            atc="" if slow else None,
            level="advice" if slow else None,
        )


def _connected(call: Call, kernel: Kernel) -> Iterator[tuple[str, tuple[KernelSlot, str]]]:
    """Each slot with a dtype that is known: the kernel's slot and the dtype."""
    assert call.prototype is not None
    sides: tuple[tuple[tuple[KernelSlot, ...], tuple[Slot, ...], Tensors, str], ...] = (
        (kernel.inputs, call.prototype.inputs, call.inputs, ""),
        (kernel.outputs, call.prototype.outputs, call.outputs, "->"),
    )
    for kernel_slots, slots, tensors, mark in sides:
        for at, slot in enumerate(slots):
            if at >= len(kernel_slots):
                break
            for number, tensor in enumerate(tensors.get(slot.name, ())):
                if tensor.tensor.dtype is not None and kernel_slots[at].dtypes:
                    name = f"{mark}{slot.name}" + (str(number) if slot.dynamic else "")
                    yield name, (kernel_slots[at], tensor.tensor.dtype)


def _column(wanted: Mapping[str, tuple[KernelSlot, str]], at: int) -> bool:
    return all(
        at < len(slot.dtypes) and slot.dtypes[at] == dtype for slot, dtype in wanted.values()
    )


def _nearest(wanted: Mapping[str, tuple[KernelSlot, str]], width: int) -> str:
    def misses(at: int) -> int:
        return sum(at >= len(s.dtypes) or s.dtypes[at] != dtype for s, dtype in wanted.values())

    best = min(range(width), key=misses)
    named = ((name, s.dtypes) for name, (s, _) in wanted.items())
    return ", ".join(f"{name} {d[best] if best < len(d) else '?'}" for name, d in named)


def _foreign(call: Call, subject: AirSubject) -> bool:
    """Whether a dtype is none of the SoC's, which another rule reports."""
    tensors = [*call.inputs.values(), *call.outputs.values()]
    dtypes = {tensor.tensor.dtype for some in tensors for tensor in some} - {None}
    return bool(dtypes - subject.target.dtypes)


def prototypes_take_the_dtypes(subject: AirSubject) -> Iterator[Finding]:
    """An operator without a table of kernels gets dtypes that its prototype lists."""
    for call in subject.calls:
        kernel, _ = kernel_for(call.op.type, subject.target)
        if kernel is not None or not call.named or call.op.type in LOCAL:
            continue
        assert call.prototype is not None
        listed = {slot.name: slot.dtypes for slot in (*call.prototype.inputs,)}
        for name, operands in call.inputs.items():
            allowed = listed.get(name)
            for operand in operands:
                dtype = operand.tensor.dtype
                if allowed and dtype is not None and dtype not in allowed:
                    yield Finding(
                        call.where,
                        f"{name} is {dtype}",
                        f"the operator takes {', '.join(sorted(allowed))}",
                        "cast it",
                    )


_PLAIN = ("ND", "NCHW", "NHWC", "", None)
_SPREAD = "_enable_storage_format_spread"


def private_formats_are_stated(subject: AirSubject) -> Iterator[Finding]:
    """What a kernel takes in FRACTAL_NZ alone is described so, or comes of a TransData."""
    for body in subject.bodies:
        for call in body.calls:
            kernel, note = kernel_for(call.op.type, subject.target)
            if kernel is None or not call.named or call.prototype is None:
                continue
            for slot, wanted in zip(call.prototype.inputs, kernel.inputs, strict=False):
                if set(wanted.formats) == {"FRACTAL_NZ"}:
                    for operand in call.inputs.get(slot.name, ()):
                        yield from _unformatted(body, call, operand, note)


def _unformatted(body: Body, call: Call, operand: Operand, note: str) -> Iterator[Finding]:
    producer, layout = body.by_name.get(operand.edge.producer), operand.tensor.layout
    stated = producer is not None and (
        _SPREAD in producer.attributes or producer.type == "TransData"
    )
    if layout == "FRACTAL_NZ" or stated:
        return
    plain = layout in _PLAIN
    yield Finding(
        call.where,
        f"{operand.name} is {layout or 'of no layout'}",
        f"its kernel takes FRACTAL_NZ alone{note}"
        + ("; GE puts a TransData in front of it" if plain else ""),
        "put a TransData before it, or describe an input that is stored so as FRACTAL_NZ",
        atc="" if plain else None,
        level="advice" if plain else None,
    )


_INFO = "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config"
_INC = "CANN 8.1.RC1:opp/built-in/op_proto/inc"
_NEAREST = f"{_INFO}/ascend910_93"

RULES = (
    Rule("air-target-dtypes", "EZ3003", "CANN 8.1.RC1:platform_config", dtypes_are_the_target_s),
    Rule("air-kernel", "EZ3003", _INFO, kernels_are_there),
    Rule("air-kernel-inferred", "EZ3003", _NEAREST, kernels_are_inferred, certainty="inferred"),
    Rule(
        "air-dtypes",
        "EZ3003, or casts that atc's precision mode adds",
        _INFO,
        dtypes_are_one_combination,
    ),
    Rule(
        "air-dtypes-inferred",
        "EZ3003, or casts that atc's precision mode adds",
        _NEAREST,
        dtypes_are_an_inferred_combination,
        certainty="inferred",
    ),
    Rule(
        "air-prototype-dtypes",
        "EZ3003, or EZ9999 in inference",
        _INC,
        prototypes_take_the_dtypes,
        certainty="inferred",
    ),
    Rule(
        "air-formats",
        "a TransData in front of the operator, or EZ3003",
        "hicann/ge:compiler/engines/nn_engine/optimizer/graph_optimizer/shape_format_transfer/"
        "trans_node_implementation/trans_node_transdata_generator.cc",
        private_formats_are_stated,
        certainty="inferred",
    ),
)
