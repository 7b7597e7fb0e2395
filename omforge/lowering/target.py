"""Targets: what an Ascend SoC and ATC's operator tables allow, as data.

A SoC is one row of `TARGETS`, or a plugin's (`ALL_TARGETS`); what the SoCs of one generation share
is a `Family`. The operator tables are read from `data/onnx_ops.tsv` (every ONNX op that ATC
registers: domain, op, opsets, GE type, source) and `data/ge_ops.tsv` (the GE operators: inputs,
outputs, attributes, dtypes).

Sources of facts are written `repository:path`.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from omforge import ir
from omforge.ir.errors import InputError
from omforge.lowering.facts import NOTHING_SEEN, Facts
from omforge.lowering.tables import table_rows
from omforge.plugins import Registry

# ATC's name for ONNX's default domain, in its operator keys `ai.onnx::<opset>::<op>`.
DEFAULT_DOMAIN = "ai.onnx"

# The GE type of an op whose plugin expands it into a small subgraph: all inputs must be there.
EXPANDED = "PartitionedCall"

_INPUT_SHAPE = "hicann/ge:docs/zh/user_guides/atc_tools/CLI_options (input_shape)"
_PRECISION_MODE = "hicann/ge:docs/zh/user_guides/atc_tools/CLI_options (precision_mode_v2)"


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
        facts: Limits in words, with their sources.
        run_time_sizes: What becomes of a size that is not known before the run.
        no_bfloat16: Why graphs are not computed in it; None where they may be.
    """

    name: str
    dtypes: frozenset[str]
    facts: tuple[Fact, ...]
    run_time_sizes: Fact = Fact(
        "the graph becomes one of dynamic shape: the host schedules each operator, nothing is sunk",
        _INPUT_SHAPE,
    )
    no_bfloat16: Fact | None = None


@dataclass(frozen=True)
class Target:
    """One SoC: the value of atc's --soc_version, and what may be lowered for it.

    `facts` are what was seen on it, or on another of its family: tables give way to them.
    """

    soc_version: str
    family: Family
    cores: int | None = None
    memory_gib: int | None = None
    facts: Facts = field(default=NOTHING_SEEN, compare=False, repr=False)

    @property
    def dtypes(self) -> frozenset[str]:
        """The dtypes that tensors may have on this SoC."""
        return self.family.dtypes


_INTEGERS = frozenset(
    ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool")
)

_310P_WITHOUT_BFLOAT16 = Fact("no bfloat16 compute: use float16", _PRECISION_MODE)

FAMILY_310P = Family(
    name="310p",
    dtypes=_INTEGERS | {"float16", "float32"},
    no_bfloat16=_310P_WITHOUT_BFLOAT16,
    facts=(
        _310P_WITHOUT_BFLOAT16,
        Fact(
            "no int4 weights: WeightQuantBatchMatmulV2 takes int8 only, one scale per channel (its "
            "document lists groups as well, its prototype excludes them)",
            "hicann/ops-nn:matmul/weight_quant_batch_matmul_v2/op_graph/"
            "weight_quant_batch_matmul_v2_proto.h",
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
    facts=(
        Fact(
            "bfloat16 compute is there; atc makes float16 of it without --precision_mode_v2=origin",
            _PRECISION_MODE,
        ),
        Fact(
            "prompt flash attention with a mask takes a zero-element or zero pse (untested on a "
            "device), so attention is lowered to MatMul and softmax",
            "mirror-cann/ops-transformer:attention/prompt_flash_attention (tiling)",
        ),
    ),
)

FAMILY_910_93 = Family(
    name="910_93",
    dtypes=FAMILY_910B.dtypes,
    facts=(
        Fact(
            "its operator tables list what 910B's do, for the operators that omforge emits",
            "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config/ascend910_93",
        ),
        *FAMILY_910B.facts,
    ),
)

_310B_WITHOUT_BFLOAT16 = Fact(
    "no bfloat16 kernel of GatherV2, ReduceMean, Rsqrt or Sigmoid: use float16",
    "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config/ascend310b",
)

FAMILY_310B = Family(
    name="310b",
    dtypes=_INTEGERS | {"float16", "float32", "bfloat16"},
    no_bfloat16=_310B_WITHOUT_BFLOAT16,
    run_time_sizes=Fact("dynamic shapes are not supported", _INPUT_SHAPE),
    facts=(
        Fact(
            "no kernel for RmsNorm, RotaryMul, ScaledMaskedSoftmax or weight-quantised products",
            "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config/ascend310b",
        ),
        _310B_WITHOUT_BFLOAT16,
        Fact("no shape ranges: static shapes or gears", _INPUT_SHAPE),
    ),
)

FAMILY_950 = Family(
    name="950",
    dtypes=FAMILY_910B.dtypes | {"float8e4m3fn", "float8e5m2"},
    facts=(
        Fact(
            "no kernel for prompt flash attention",
            "mirror-cann/ops-transformer:attention/prompt_flash_attention (op_host definition)",
        ),
        Fact(
            "float8 constants are taken as external data only",
            "hicann/ge:parser/parser/onnx/onnx_constant_parser.cc",
        ),
        Fact(
            "up to 256 gears, where other SoCs have up to 100",
            "hicann/ge:docs/zh/user_guides/atc_tools/CLI_options (dynamic_dims)",
        ),
        Fact(
            "CANN 8.1 spells it Ascend910_95, later releases Ascend950 with a suffix: take what "
            "npu-smi info says",
            "CANN 8.1.RC1:platform_config",
        ),
    ),
)

# Cores and memory only where the contract states them: nothing is decided by them.
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
    Target("Ascend910_9362", FAMILY_910_93),
    Target("Ascend910_9372", FAMILY_910_93),
    Target("Ascend910_9381", FAMILY_910_93),
    Target("Ascend910_9382", FAMILY_910_93),
    Target("Ascend910_9391", FAMILY_910_93),
    Target("Ascend910_9392", FAMILY_910_93),
    Target("Ascend310B1", FAMILY_310B),
    Target("Ascend310B2", FAMILY_310B),
    Target("Ascend310B3", FAMILY_310B),
    Target("Ascend310B4", FAMILY_310B),
    Target("Ascend910_95", FAMILY_950),
)

CPU = Target("cpu", Family("cpu", _INTEGERS | {"float32", "uint4", "int4"}, facts=()))
"""This machine, by ONNX Runtime: no SoC, and no graph for it goes through atc."""

TARGETS: Mapping[str, Target] = {row.soc_version: row for row in _ROWS}


def _as_target(name: str, made: object) -> Target:
    made = made() if callable(made) else made
    if not isinstance(made, Target):
        raise ValueError(f"it is {made!r}, and neither a Target nor what returns one")
    if name and made.soc_version != name:
        raise ValueError(f"its soc_version is {made.soc_version!r}, and not {name!r}")
    known = {row.family.name for row in TARGETS.values()}
    if made.family.name not in known:
        raise ValueError(
            f"no table lists the kernels of its family {made.family.name!r}: take one of "
            f"{', '.join(sorted(known))}, or dataclasses.replace() what differs in one"
        )
    return made


ALL_TARGETS: Registry[Target] = Registry({**TARGETS, "cpu": CPU}, "omforge.targets", _as_target)
"""The SoCs of plugins, too, and the CPU."""


def target(name: str) -> Target:
    """Return the target of that --soc_version.

    Raises:
        InputError: It is not known; the message lists the known ones and the nearest spelling.
    """
    found = ALL_TARGETS.get(name)
    if found is not None:
        return found
    known = f"known are {', '.join(ALL_TARGETS)}"
    # Compared without "ascend", which all names share and which `npu-smi info` leaves out.
    folded = {soc.lower().removeprefix("ascend"): soc for soc in ALL_TARGETS}
    wanted = name.strip().lower().removeprefix("ascend")
    near = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.6)
    next_step = f"Did you mean {folded[near[0]]}?" if near else "Choose one of these"
    raise InputError(f"the SoC {name!r} is not known", known, next_step)


def dtype_name(dtype: ir.DataType | None) -> str:
    """Return the name used in targets and manifests: "float16", "int32", "bool", "" for None."""
    if dtype is None:
        return ""
    return _DTYPE_NAMES.get(dtype, dtype.name.lower())


_DTYPE_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}


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
    dynamic_outputs: bool = False

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
    opset_text: str = ""

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


def all_registrations() -> tuple[Registration, ...]:
    """Return every row of the table, those of custom builds included."""
    return tuple(row for rows in _onnx_ops().values() for row in rows)


def ge_op(name: str) -> GeOp | None:
    """Return a GE operator, or None where the table does not list its prototype."""
    return _ge_ops().get(name)


@functools.lru_cache(maxsize=1)
def _onnx_ops() -> Mapping[tuple[str, str], tuple[Registration, ...]]:
    table: dict[tuple[str, str], tuple[Registration, ...]] = {}
    for row in table_rows("onnx_ops.tsv"):
        key = (row["domain"], row["onnx_op_type"])
        versions = row["opset_versions"]
        entry = Registration(*key, _opsets(versions), row["ge_op_type"], row["source"], versions)
        table[key] = (*table.get(key, ()), entry)
    return table


@functools.lru_cache(maxsize=1)
def _ge_ops() -> Mapping[str, GeOp]:
    gathered: dict[str, list[dict[str, str]]] = {}
    for row in table_rows("ge_ops.tsv"):
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
    source, grows = rows[0]["source"], any(row["kind"] == "dynamic_output" for row in rows)
    return GeOp(name, tuple(inputs), tuple(outputs), tuple(attributes), source, grows)


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
