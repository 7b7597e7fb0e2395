"""What omforge says of one target op: the record of which `ops` is the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import onnx
import onnx_ir as ir

from omforge.ir.dims import Dim

Typed = tuple[ir.DataType, tuple[Dim, ...]]
Shapes = tuple[Typed, ...]
Infer = Callable[[Sequence[Typed]], Shapes]


@dataclass(frozen=True)
class TargetInput:
    """One input in ATC's order; `dtypes` are the ONNX names allowed per SoC family."""

    name: str
    dtypes: Mapping[str, frozenset[str]]
    required: bool = True


@dataclass(frozen=True)
class TargetAttribute:
    """One attribute that the plugin reads; a wrong type or name is silently ignored by ATC."""

    name: str
    type: Literal["INT", "FLOAT", "STRING"]
    default: int | float | str | None = None
    required: bool = False


@dataclass(frozen=True)
class TargetOp:
    """One operator of the target.

    Attributes:
        name: The op type in the default domain.
        npu_name: The op type in domain `npu`, version 1 (they differ for a few ops).
        ge_type: The GE operator that the plugin makes of it.
        opsets: The default-domain opsets that register it.
        inputs: In ATC's order.
        outputs: Names, in order.
        attributes: What the plugin reads.
        infer: From the inputs' dtypes and shapes to the outputs'.
        body: The reference body, ONNX function text for opset 16.
        variant: Where the body depends on the inputs that a node has: from a node of a twin graph,
            whose constants it may respell, to the body's name and text.
        summary: One line for the documentation table.
        limits: What the documentation restricts, in words.
        sources: Where the facts come from.
    """

    name: str
    npu_name: str
    ge_type: str
    opsets: range
    inputs: tuple[TargetInput, ...]
    outputs: tuple[str, ...]
    attributes: tuple[TargetAttribute, ...]
    infer: Infer
    body: str
    summary: str
    limits: tuple[str, ...] = ()
    sources: tuple[str, ...] = field(default=())
    variant: Callable[[ir.Node], tuple[str, str]] | None = None

    @cached_property
    def function(self) -> onnx.FunctionProto:
        """The reference body as a function of domain `npu`."""
        return onnx.parser.parse_function(self.body)

    @property
    def required_inputs(self) -> int:
        """How many leading inputs a node must give."""
        return sum(item.required for item in self.inputs)
