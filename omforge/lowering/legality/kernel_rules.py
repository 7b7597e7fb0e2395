"""Rules for what lies behind the parser: kernels and dtypes per SoC, from `data/llm_ops.tsv`."""

from __future__ import annotations

from collections.abc import Iterator

from omforge import ir
from omforge.lowering.facts import row_key
from omforge.lowering.legality.subject import Finding, Rule, Subject
from omforge.lowering.llm_ops import LlmOp, llm_op
from omforge.lowering.target import dtype_name


def has_kernel(subject: Subject) -> Iterator[Finding]:
    """The operator has a kernel on the SoC, and was not seen to fail there."""
    family = subject.target.family.name
    for node, op in _known(subject):
        seen = subject.target.facts.of("operator", kernels_key(op))
        if seen is not None:
            if not seen.holds:
                what = f"{op.name} does not work on {family}"
                yield Finding(ir.describe(node), what, seen.words, _remedy(op))
        elif family not in op.families:
            there = ", ".join(sorted(op.families))
            yield Finding(
                ir.describe(node),
                f"no kernel for {op.name} on {family}",
                f"there are kernels for {there} ({op.kernels.source})",
                _remedy(op),
            )


def kernel_dtypes(subject: Subject) -> Iterator[Finding]:
    """Inputs have the dtypes that the SoC's kernels take."""
    family = subject.target.family.name
    for node, op in _known(subject):
        for value, slot in zip(node.inputs, op.of("input"), strict=False):
            allowed = op.dtypes(slot.name, family)
            if value is None or value.dtype is None or allowed is None:
                continue
            name = dtype_name(value.dtype)
            if name not in allowed:
                yield Finding(
                    ir.describe(node),
                    f"{op.name} with {name} at {slot.name}",
                    f"on {family} it takes {', '.join(sorted(allowed))}",
                    "run `convert-precision`, cast the input, or decompose the op",
                )


def kernels_key(op: LlmOp) -> str:
    """What `claims.tsv` calls the row with an operator's kernels."""
    row = op.kernels
    return row_key(op.name, f"{row.kind} {row.name} {row.value}")


def _known(subject: Subject) -> Iterator[tuple[ir.Node, LlmOp]]:
    for node in subject.nodes:
        op = llm_op(node.domain, node.op_type)
        if op is not None and subject.plugin(node) is not None:
            yield node, op


def _remedy(op: LlmOp) -> str:
    if op.name.startswith("NPU"):
        return "write it in standard operators, as `omforge compile` does where a SoC lacks it"
    return "choose another SoC, or quantise weights only"


_OPS_INFO = "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config/<soc>/aic-<soc>-ops-info.json"

RULES = (
    Rule("kernel", "no kernel: the build fails behind the parser", _OPS_INFO, has_kernel),
    Rule("kernel-dtype", "no kernel for the dtype", _OPS_INFO, kernel_dtypes),
)
