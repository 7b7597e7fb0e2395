"""The types of a norm: what goes in, what it is computed in, and what comes out.

Exporters compute norms of half precision in float32, and old ones in float64, between casts::

    w = Cast<to=w>(x)  ...  y = Mul(Cast<to=x>(norm of w), gamma)     # gamma in x's type
    w = Cast<to=w>(x)  ...  y = Cast<to=x>(Mul(norm of w, gamma))     # gamma in the wider one

Tools that turn a float32 model into a half one leave some operators in float32, each between casts
of its own, so that what lies between is rounded again and again (`rounded`).

The operators compute in float32 whatever x is (stash_type), and round before gamma. So they take
the first form in whole; of the second the casts stay around a norm in float32. No NPU has a norm in
float64, which becomes float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import Match, NoMatch
from omforge.rewriting.pattern import ANY, Pat, PatternOps

_FLOATS = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE}


@dataclass(frozen=True)
class NormTypes:
    """Types of one norm.

    Attributes:
        computed: The type of the operator's inputs and output.
        output: The type of what is replaced.
    """

    computed: ir.DataType
    output: ir.DataType

    def source(self, op: Builder, m: Match) -> ir.Value:
        """What is normalised, in the operator's type."""
        wide = m.get("wide")
        return wide if wide is not None and wide.dtype == self.computed else self.cast(op, m.x)

    def cast(self, op: Builder, value: ir.Value) -> ir.Value:
        """The value in the operator's type."""
        return value if value.dtype == self.computed else op.Cast(value, to=int(self.computed))

    def result(self, op: Builder, norm: ir.Value) -> ir.Value:
        """The norm in the type of what it replaces."""
        return norm if self.output == self.computed else op.Cast(norm, to=int(self.output))


def rounded(op: PatternOps, value: Pat) -> Pat:
    """Match a value within a norm, rounded to another type or not, and widened again or not.

    That no type is narrower than what goes in and comes out is for `between_casts` to say.
    """
    once = op.Cast(value, to=ANY)
    return value | once | op.Cast(once, to=ANY)


def between_casts(m: Match) -> NormTypes:
    """The types of a matched norm: of `x`, perhaps cast to `wide`, and `narrowed` at the end.

    Raises:
        NoMatch: It is not all floats, or a norm in float32 with its casts around it: the part
            within them is a match of its own.
    """
    output, source, wide = _float(m.output), _float(m.x), m.get("wide")
    narrowest = min(output.bitwidth, source.bitwidth)
    for node in m.nodes:
        dtype = node.outputs[0].dtype
        kept = dtype in (source, output) or (dtype is not None and dtype.bitwidth > narrowest)
        if dtype not in _FLOATS or not kept:
            raise NoMatch(f"it goes through {dtype}", node)
    if "narrowed" not in m:
        # Before gamma it is in x's type again, or in that of a wider x that nothing casts back.
        if output not in (source, None if wide is None else wide.dtype):
            raise NoMatch(f"x is {source} but the norm returns {output}", m.output)
        if output == ir.DataType.DOUBLE and wide is not None:
            raise NoMatch("it is computed in double, and what is cast back is more than it", wide)
        return NormTypes(output, output)
    whole = m.narrowed.producer()
    assert whole is not None
    before = whole.inputs[0]
    if before is None or before.dtype != ir.DataType.DOUBLE or output == ir.DataType.DOUBLE:
        raise NoMatch("a cast stands around it", m.output)
    return NormTypes(ir.DataType.FLOAT, output)


def _float(value: ir.Value) -> ir.DataType:
    if value.dtype is None or value.dtype not in _FLOATS:
        raise NoMatch(f"{value.name} is {value.dtype}", value)
    return value.dtype


def ones(m: Match, dtype: ir.DataType) -> npt.NDArray[Any]:
    """A gamma for a norm that has none.

    Raises:
        NoMatch: The size of x is not a number.
    """
    *_, size = m.shape("x", "... H")
    if not isinstance(size, int):
        raise NoMatch(f"the size of {m.x.name}, {size}, is not a number", m.x)
    return np.ones(size, dtype=dtype.numpy())
