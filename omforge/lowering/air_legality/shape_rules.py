"""Rules for shapes: operands fit each other, and results are as they are stated."""

from __future__ import annotations

from collections.abc import Iterator

from omforge.lowering.air_legality.fused_shapes import FUSED
from omforge.lowering.air_legality.moved_shapes import MOVED
from omforge.lowering.air_legality.shapes import COMPUTED, Misfit, Shapes
from omforge.lowering.air_legality.subject import AirSubject, Call
from omforge.lowering.legality.subject import Finding, Rule

PLAIN = {**COMPUTED, **MOVED}
_TABLE = {**PLAIN, **FUSED}


def operands_fit(subject: AirSubject) -> Iterator[Finding]:
    """Operands broadcast, multiply, join and split as the operator has it."""
    for call in subject.typed(*PLAIN):
        try:
            PLAIN[call.op.type](call)
        except Misfit as fault:
            yield Finding(call.where, f"operands do not fit: {fault}", "", "mend the shapes")


def results_are_as_stated(subject: AirSubject) -> Iterator[Finding]:
    """The shape of a result is what the operator makes of its operands."""
    for call in subject.typed(*_TABLE):
        for name, shapes in (_inferred(call) or {}).items():
            stated = call.outputs.get(name, ())
            if len(stated) != len(shapes):
                yield Finding(
                    call.where,
                    f"{len(stated)} outputs {name}, where the operator makes {len(shapes)}",
                    "",
                    "describe each",
                )
                continue
            for result, shape in zip(stated, shapes, strict=True):
                found = result.tensor.shape
                if found is not None and not _agree(found, shape):
                    yield Finding(
                        call.where,
                        f"{name} is stated as {list(found)}, and becomes {list(shape)}",
                        "",
                        "state what the operator makes",
                    )


def _inferred(call: Call) -> Shapes:
    try:
        return _TABLE[call.op.type](call)
    except Misfit:
        return None  # reported by operands_fit


def _agree(stated: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether they are one but for dims that are not stated."""
    if len(stated) != len(shape):
        return False
    return all(own in (dim, -1) for own, dim in zip(stated, shape, strict=True))


def copies_keep_the_dtype(subject: AirSubject) -> Iterator[Finding]:
    """What moves numbers, or writes into a cache, keeps their dtype."""
    for call in subject.calls:
        if not call.named or call.prototype is None:
            continue
        for name in sorted(call.prototype.refs):
            for operand, result in zip(
                call.inputs.get(name, ()), call.outputs.get(name, ()), strict=False
            ):
                yield from _kept(call, name, operand.tensor.dtype, result.tensor.dtype)
        if call.op.type in _MOVES:
            given, made = call.prototype.inputs, call.prototype.outputs
            slot = next(slot.name for slot in given if slot.name in ("x", "src"))
            yield from _kept(
                call, made[0].name, call.tensor(slot).dtype, call.result(made[0].name).dtype
            )


def _kept(call: Call, name: str, given: str | None, made: str | None) -> Iterator[Finding]:
    if None not in (given, made) and given != made:
        yield Finding(
            call.where,
            f"{name} is stated as {made}, and becomes {given}",
            "",
            "state what the operator makes, or cast",
        )


_MOVES = frozenset((*MOVED, "Identity", "TensorMove", "TransData"))

_INFERENCE = "hicann/ge:compiler/graph/preprocess/graph_prepare.cc (InferShapeForPreprocess)"

RULES = (
    Rule("air-shapes-fit", "EZ9999 in shape inference, or in tiling", _INFERENCE, operands_fit),
    Rule(
        "air-output-shapes",
        "inference replaces the shape, and what was made for the stated one is wrong",
        _INFERENCE,
        results_are_as_stated,
    ),
    Rule(
        "air-output-dtypes",
        "inference replaces the dtype, and what was made for the stated one is wrong",
        _INFERENCE,
        copies_keep_the_dtype,
    ),
)
