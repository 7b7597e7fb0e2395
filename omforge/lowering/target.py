"""Targets: what an Ascend SoC and ATC's operator tables allow, as data.

A SoC is one row of `TARGETS`; what the SoCs of one generation share is a `Family`. The operator
tables are read from `data/onnx_ops.tsv` (every ONNX op that ATC registers: domain, op, opsets, GE
type, source) and `data/ge_ops.tsv` (the GE operators: inputs, outputs, attributes, dtypes).

Sources of facts are written `repository:path`.
"""

from __future__ import annotations

import csv
import difflib
import functools
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from omforge import ir
from omforge.ir.errors import InputError

# ATC's name for ONNX's default domain, in its operator keys `ai.onnx::<opset>::<op>`.
DEFAULT_DOMAIN = "ai.onnx"

# The GE type of an op whose plugin expands the node into a small subgraph (hicann/ge:parser, the
# plugin's ParseOpToGraph). Such a node's inputs must all be there.
EXPANDED = "PartitionedCall"


@dataclass(frozen=True)
class Fact:
    """One sentence about a target, and where it was read."""

    text: str
    source: str


@dataclass(frozen=True)
class Family:
    """What all SoCs of one generation share.

    Attributes:
        name: The short name of its operator configuration, as `aic-<name>-ops-info.json`.
        dtypes: The dtypes that tensors may have.
        fused_ops: The target ops that `legalize` may emit.
        facts: Limits in words, with their sources.
    """

    name: str
    dtypes: frozenset[str]
    fused_ops: frozenset[str]
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Target:
    """One SoC: the value of atc's --soc_version, and what may be lowered for it."""

    soc_version: str
    family: Family
    cores: int | None = None
    memory_gib: int | None = None

    @property
    def dtypes(self) -> frozenset[str]:
        """The dtypes that tensors may have on this SoC."""
        return self.family.dtypes

    def has(self, op: str) -> bool:
        """Say whether this target op may be emitted."""
        return op in self.family.fused_ops


_INTEGERS = frozenset(
    ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool")
)

FAMILY_310P = Family(
    name="310p",
    dtypes=_INTEGERS | {"float16", "float32"},
    fused_ops=frozenset(("NPURmsNorm", "NPURotaryMul")),
    facts=(
        Fact(
            "no bfloat16 compute: use float16",
            "hicann/ge:docs/zh/user_guides/atc_tools/CLI_options (precision_mode_v2)",
        ),
        Fact(
            "no int4 weights: WeightQuantBatchMatmulV2 takes int8 only",
            "hicann/ops-nn:matmul/weight_quant_batch_matmul_v2/framework/"
            "npu_weight_quant_batchmatmul_v2_onnx_plugin.cpp",
        ),
        Fact(
            "masked prompt flash attention cannot be reached: a mask needs a pse slot, and a pse "
            "tensor is refused",
            "mirror-cann/ops-transformer:attention/prompt_flash_attention (tiling)",
        ),
    ),
)

FAMILY_910B = Family(
    name="910b",
    dtypes=_INTEGERS | {"float16", "float32", "bfloat16", "int4"},
    fused_ops=frozenset(("NPURmsNorm", "NPURotaryMul")),
    facts=(
        Fact(
            "bfloat16 compute is there; atc's default precision turns it into float16, so compile "
            "with --precision_mode_v2=origin",
            "hicann/ge:docs/zh/user_guides/atc_tools/CLI_options (precision_mode_v2)",
        ),
        Fact(
            "prompt flash attention with a mask takes a zero-element or zero pse (untested on a "
            "device), so attention is lowered to MatMul and softmax",
            "mirror-cann/ops-transformer:attention/prompt_flash_attention (tiling)",
        ),
    ),
)

# A further SoC is one more row. Cores and memory only where the contract states them: they are for
# reports, nothing is decided by them.
_ROWS = (
    Target("Ascend310P1", FAMILY_310P),
    Target("Ascend310P3", FAMILY_310P, cores=8, memory_gib=24),
    Target("Ascend310P5", FAMILY_310P),
    Target("Ascend310P7", FAMILY_310P),
    Target("Ascend910B1", FAMILY_910B, cores=24, memory_gib=64),
    Target("Ascend910B2", FAMILY_910B),
    Target("Ascend910B2C", FAMILY_910B),
    Target("Ascend910B3", FAMILY_910B),
    Target("Ascend910B4", FAMILY_910B, cores=20, memory_gib=32),
    Target("Ascend910B4-1", FAMILY_910B),
)

TARGETS: Mapping[str, Target] = {row.soc_version: row for row in _ROWS}


def target(name: str) -> Target:
    """Return the target of that --soc_version.

    Raises:
        InputError: It is not known; the message lists the known ones and the nearest spelling.
    """
    found = TARGETS.get(name)
    if found is not None:
        return found
    known = f"known are {', '.join(TARGETS)}"
    # Compared without "ascend", which all names share and which `npu-smi info` leaves out.
    folded = {soc.lower().removeprefix("ascend"): soc for soc in TARGETS}
    wanted = name.strip().lower().removeprefix("ascend")
    near = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.6)
    next_step = f"Did you mean {folded[near[0]]}?" if near else "Choose one of these"
    raise InputError(f"the SoC {name!r} is not known", known, next_step)


def dtype_name(dtype: ir.DataType | None) -> str:
    """Return the name used in targets and manifests: "float16", "int32", "bool", "" for None."""
    if dtype is None:
        return ""
    return _DTYPE_NAMES.get(dtype, dtype.name.lower())


_DTYPE_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.DOUBLE: "float64",
}


@dataclass(frozen=True)
class GeInput:
    """One input of a GE operator; `dtypes` is None where the table names no closed list."""

    name: str
    kind: str
    dtypes: frozenset[str] | None


@dataclass(frozen=True)
class GeAttribute:
    """One attribute of a GE operator, with the type and default as the table writes them."""

    name: str
    type: str
    default: str
    required: bool


@dataclass(frozen=True)
class GeOp:
    """One GE operator, as its prototype registers it."""

    name: str
    inputs: tuple[GeInput, ...]
    outputs: tuple[str, ...]
    attributes: tuple[GeAttribute, ...]
    source: str

    @property
    def required_inputs(self) -> int:
        """How many inputs must be connected."""
        return sum(item.kind == "input" for item in self.inputs)


@dataclass(frozen=True)
class Registration:
    """One ONNX op that ATC registers, at some opsets of one domain."""

    domain: str
    op: str
    opsets: frozenset[int]
    ge_type: str
    source: str

    @property
    def experimental(self) -> bool:
        """True for a plugin that only custom builds of CANN contain."""
        return "experimental/" in self.source


def registered(domain: str, op: str, opset: int) -> str | None:
    """Return the GE type that ATC maps an op to, or None: there is no fallback to another opset.

    Source: hicann/ge:parser/parser/onnx/onnx_parser.cc (exact string `domain::opset::op`).
    """
    for row in registrations(domain, op):
        if opset in row.opsets:
            return row.ge_type
    return None


def registrations(domain: str, op: str) -> tuple[Registration, ...]:
    """Return the rows of an op that standard builds of CANN contain, in the table's order."""
    rows = _onnx_ops().get((domain or DEFAULT_DOMAIN, op), ())
    return tuple(row for row in rows if not row.experimental)


def ge_op(name: str) -> GeOp | None:
    """Return a GE operator, or None where the table does not list its prototype."""
    return _ge_ops().get(name)


@functools.lru_cache(maxsize=1)
def _onnx_ops() -> Mapping[tuple[str, str], tuple[Registration, ...]]:
    table: dict[tuple[str, str], tuple[Registration, ...]] = {}
    for row in _rows("onnx_ops.tsv"):
        key = (row["domain"], row["onnx_op_type"])
        entry = Registration(*key, _opsets(row["opset_versions"]), row["ge_op_type"], row["source"])
        table[key] = (*table.get(key, ()), entry)
    return table


@functools.lru_cache(maxsize=1)
def _ge_ops() -> Mapping[str, GeOp]:
    gathered: dict[str, list[dict[str, str]]] = {}
    for row in _rows("ge_ops.tsv"):
        gathered.setdefault(row["ge_op"], []).append(row)
    return {name: _ge_op(name, rows) for name, rows in gathered.items()}


def _ge_op(name: str, rows: list[dict[str, str]]) -> GeOp:
    inputs: list[GeInput] = []
    outputs: list[str] = []
    attributes: list[GeAttribute] = []
    for row in rows:
        kind = row["kind"]
        first, _, rest = (part.strip() for part in row["spec"].partition(","))
        if kind.endswith("input"):
            inputs.append(GeInput(first, kind, _dtypes(rest)))
        elif kind.endswith("output"):
            outputs.append(first)
        else:
            type_, _, default = (part.strip() for part in rest.partition(","))
            attributes.append(GeAttribute(first, type_, default, kind == "required_attr"))
    return GeOp(name, tuple(inputs), tuple(outputs), tuple(attributes), rows[0]["source"])


def _rows(file: str) -> Iterator[dict[str, str]]:
    path = importlib.resources.files("omforge.lowering") / "data" / file
    lines = path.read_text(encoding="utf-8").splitlines()
    # QUOTE_NONE: a dtype given as a template parameter is written "T1", quotes included.
    yield from csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)


def _opsets(text: str) -> frozenset[int]:
    """Read "8-18" or "11-16,19"; "(none)" is a plugin without an opset, which no model reaches."""
    if text == "(none)":
        return frozenset()
    versions: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        versions.update(range(int(low), int(high or low) + 1))
    return frozenset(versions)


def _dtypes(spec: str) -> frozenset[str] | None:
    """Read the closed list of dtypes in a prototype; None for macros such as ::ALL() and "T1"."""
    if _MACRO.search(spec):
        # What a macro expands to is not in the tables, so nothing is forbidden by it.
        return _INDEX_DTYPES if "IndexNumberType" in spec else None
    names: list[str] = _DTYPE.findall(spec)
    return frozenset(_GE_DTYPES.get(name, name.lower()) for name in names) if names else None


_DTYPE = re.compile(r"DT_([A-Z0-9_]+)")
_MACRO = re.compile(r"\w*Type\b|::ALL|\"T")
_INDEX_DTYPES = frozenset(("int32", "int64"))
_GE_DTYPES: Mapping[str, str] = {"FLOAT": "float32", "DOUBLE": "float64", "BF16": "bfloat16"}
