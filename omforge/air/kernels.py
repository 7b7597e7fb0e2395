"""Which AI Core kernels CANN 8.1.RC1 has on a SoC family, and the dtypes that each takes.

Source: CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config/<soc>/aic-<soc>-ops-info.json, by way
of `data/kernels.tsv`. An operator that is not in the table has no such kernel on any of its
families, or is none of the 221 that the table is about (`listed` tells).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from omforge.air.tables import table_rows

FAMILIES: Mapping[str, str] = {
    "ascend310p": "310p",
    "ascend310b": "310b",
    "ascend910b": "910b",
    "ascend910_93": "910_93",
}
"""The table's SoCs, by omforge's names of families; it has none for 950."""


@dataclass(frozen=True)
class KernelSlot:
    """One input or output; the k-th of `dtypes` of all slots are one combination.

    Both lists are empty where the kernel chooses by itself what it takes.
    """

    name: str
    param: str
    dtypes: tuple[str, ...]
    formats: tuple[str, ...]


@dataclass(frozen=True)
class KernelAttribute:
    """One attribute: `type`, `default` and the values that are allowed ("all" for any)."""

    name: str
    required: bool
    type: str
    default: str
    allowed: str


@dataclass(frozen=True)
class Kernel:
    """The kernel of one operator on one family."""

    op: str
    family: str
    inputs: tuple[KernelSlot, ...]
    outputs: tuple[KernelSlot, ...]
    attributes: tuple[KernelAttribute, ...]


def kernel(op_type: str, family: str) -> Kernel | None:
    """Return the kernel of an operator on a family, None where there is none."""
    return kernels().get((op_type, family))


def listed(op_type: str) -> bool:
    """Whether the table is about this operator at all."""
    return op_type in _listed()


@functools.lru_cache(maxsize=1)
def _listed() -> frozenset[str]:
    return frozenset(op for op, _ in kernels())


@functools.lru_cache(maxsize=1)
def kernels() -> Mapping[tuple[str, str], Kernel]:
    """All kernels by operator and family."""
    gathered: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for soc, op, *rest in table_rows("kernels.tsv"):
        gathered.setdefault((op, FAMILIES[soc]), []).append(tuple(rest))
    return {key: _kernel(*key, rows) for key, rows in gathered.items()}


def _kernel(op: str, family: str, rows: list[tuple[str, ...]]) -> Kernel:
    inputs: list[KernelSlot] = []
    outputs: list[KernelSlot] = []
    attributes: list[KernelAttribute] = []
    for kind, _, name, param, values, last in rows:
        if kind == "attr":
            type_, _, default = values.partition("=")
            attributes.append(KernelAttribute(name, param == "required", type_, default, last))
            continue
        slot = KernelSlot(name, param, tuple(map(_name, _split(values))), _split(last))
        (inputs if kind == "input" else outputs).append(slot)
    return Kernel(op, family, tuple(inputs), tuple(outputs), tuple(attributes))


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def _name(dtype: str) -> str:
    return {"float": "float32", "double": "float64"}.get(dtype, dtype)
