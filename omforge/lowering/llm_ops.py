"""What is known of the operators that LLMs use, by row of `data/llm_ops.tsv`, each with its source.

A row is about one operator as ATC's plugins and kernels take it: its inputs in order, attributes
as the plugin reads them (`TYPE = default; note`), dtypes and limits per SoC family, silent traps,
and notes on versions of CANN. `certainty` says how it is known: seen by running CANN's parser, read
in a source or document, or inferred.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from omforge.lowering.tables import table_rows

# Domain `npu` spells this one without the prefix (hicann/ops-nn, see onnx_ops.tsv).
_ALIASES = {("npu", "WeightQuantBatchMatmulV2"): "NPUWeightQuantBatchMatmulV2"}


@dataclass(frozen=True)
class Row:
    """One fact: what it is about, where it holds ("" is everywhere), and how it is known."""

    op: str
    kind: str
    name: str
    value: str
    families: frozenset[str]
    certainty: str
    source: str

    def holds_on(self, family: str) -> bool:
        """Say whether the fact is about this SoC family."""
        return not self.families or family in self.families


@dataclass(frozen=True)
class LlmOp:
    """What is known of one operator."""

    name: str
    rows: tuple[Row, ...]

    def of(self, kind: str) -> tuple[Row, ...]:
        """The rows of one kind, in order: input, output, attribute, dtype, limit, trap, version."""
        return tuple(row for row in self.rows if row.kind == kind)

    @property
    def summary(self) -> str:
        """What it computes, or what it becomes."""
        return self.of("summary")[0].value

    @property
    def kernels(self) -> Row:
        """The SoC families that have a kernel, with the source."""
        return self.of("soc")[0]

    @property
    def families(self) -> frozenset[str]:
        """The SoC families that have a kernel."""
        return frozenset(self.kernels.value.split(","))

    def dtypes(self, slot: str, family: str) -> frozenset[str] | None:
        """The dtypes that an input may have there, or None where the table has none."""
        for row in self.of("dtype"):
            if row.name == slot and row.holds_on(family):
                return frozenset(row.value.split(","))
        return None


def llm_op(domain: str, op_type: str) -> LlmOp | None:
    """Return what is known of an operator, or None if it is not in the table."""
    return llm_ops().get(_ALIASES.get((domain, op_type), op_type))


@functools.lru_cache(maxsize=1)
def llm_ops() -> Mapping[str, LlmOp]:
    """Return the table by operator, in its order."""
    found: dict[str, list[Row]] = {}
    for line in table_rows("llm_ops.tsv"):
        families = frozenset(line["soc"].split(",")) if line["soc"] else frozenset[str]()
        row = Row(
            op=line["op"],
            kind=line["kind"],
            name=line["name"],
            value=line["value"],
            families=families,
            certainty=line["certainty"],
            source=line["source"],
        )
        found.setdefault(row.op, []).append(row)
    return {name: LlmOp(name, tuple(rows)) for name, rows in found.items()}
