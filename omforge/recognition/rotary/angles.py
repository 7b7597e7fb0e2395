"""Rotary tables, recognised by the angles they are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.evaluate import Cutout, EvaluationError, sizes
from omforge.ir.values import dims, known
from omforge.recognition.attention.masks import Prober
from omforge.recognition.interface import Interface
from omforge.recognition.views import Movement, is_same_movement, shape_of, trace
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch

Array = npt.NDArray[Any]

# Among each are 0 (where the cosine is the scale) and 1 (where the angle is the frequency). The
# first stay short and the second go far beyond any trained context: tables that depend on the
# length turn to other frequencies there, for all positions of a run at once.
_NEAR = np.array([1, 0, 5, 2, 7, 3, 6, 4], dtype=np.int64)
_FAR = np.array([1, 0, 131071, 300, 5, 4000, 2, 7], dtype=np.int64)
_PASTS = (3, 131072)
_ROWS = 32
"""At either end of a run that are compared."""

Pairs = Literal["half", "interleaved", "single"]
"""Where a table has the numbers of a pair: half its width apart, side by side, or only once."""

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)

# Bits of mantissa decide how near the tables are to what they hold. float32 must agree to its last
# ones, or far positions would drift.
_CLOSE = {ir.DataType.FLOAT16: 1e-3, ir.DataType.BFLOAT16: 8e-3}
_EXACT = 2e-6


@dataclass(frozen=True)
class Rotation:
    """Tables `scale * cos(position * inv_freq)`, and the same of sin.

    Attributes:
        inv_freq: float32, one frequency for each element of the tables' last axis; negative where
            the sine has the other sign, for the cosine does not tell.
        scale: What YaRN and LongRoPE multiply both tables by; 1 otherwise.
        position: Integer [B, S], [1, S] or [S].
        rounded: The dtype that the tables pass through, if it is narrower than the one they have.
    """

    inv_freq: Array
    scale: float
    position: ir.Value
    rounded: ir.DataType | None = None

    def frequencies(self, pairs: Pairs) -> Array:
        """float32 [R / 2]: each pair's frequency once.

        Raises:
            NoMatch: The elements of a pair turn at different frequencies.
        """
        if pairs == "single":
            return self.inv_freq
        first, second = halves(self.inv_freq, pairs == "interleaved")
        if not np.array_equal(first, second):
            raise NoMatch("the two elements of a rotated pair have different frequencies")
        return first


def halves(table: Array, interleaved: bool) -> tuple[Array, Array]:
    """The first and the second elements of the pairs along the last axis."""
    if interleaved:
        return table[..., 0::2], table[..., 1::2]
    half = table.shape[-1] // 2
    return table[..., :half], table[..., half:]


def recognise(prober: Prober, cos: ir.Value, sin: ir.Value) -> Rotation:
    """The rotation that two tables hold.

    The angle is what the one Cos and the one Sin in the tables' making share; at position 1 it is
    the frequency itself, to the bit.

    Raises:
        NoMatch: The tables are no function `scale * cos(position * inv_freq)` of the token's own
            position.
    """
    angle = _angle(prober, cos, sin)
    source = _unrepeated(_integer_source(prober, angle))
    try:
        part = Cutout([angle, cos, sin], [source], prober.opset)
        rounded = _rounded(Cutout([cos], [angle], prober.opset), cos)
        if rounded != _rounded(Cutout([sin], [angle], prober.opset), sin):
            raise NoMatch("only one of cosine and sine is rounded", cos)
        close = _CLOSE.get(rounded or cos.dtype or ir.DataType.FLOAT, _EXACT)
        near = _tables(_run(prober, part, source, _NEAR, _PASTS[0]), cos, sin, close)
        far = _tables(_run(prober, part, source, _FAR, _PASTS[1]), cos, sin, close)
    except EvaluationError as error:
        why = f"its angles are made of more than {source.name}: {error}"
        raise NoMatch(f"{why}; do they depend on the length of the text?", cos) from error
    if near[1] != far[1] or not np.array_equal(near[0], far[0]):
        raise NoMatch("its frequencies depend on the length", cos)
    return Rotation(near[0], near[1], _flat_position(source), rounded)


def _rounded(part: Cutout, table: ir.Value) -> ir.DataType | None:
    """The narrow dtype that a wider table has been cast to on its way."""
    casts = [node.outputs[0].dtype for node in part.nodes if node.op_type == "Cast"]
    return next((dtype for dtype in casts if dtype in _CLOSE and dtype != table.dtype), None)


def _tables(
    run: tuple[Array, Array, Array, Array], cos: ir.Value, sin: ir.Value, close: float
) -> tuple[Array, float]:
    """Frequencies and scale of the tables of one run, if they are a rotation's."""
    angles, cosines, sines, flat = run
    count = flat.size
    angles = _one_of_copies(angles, count)
    angles, cosines, sines = (
        table.reshape(count, -1).astype(np.float32) if table.size % count == 0 else table
        for table in (angles, cosines, sines)
    )
    if {len(angles), len(cosines)} != {count} or cosines.shape != sines.shape:
        raise NoMatch(f"{cosines.shape} cosines and {sines.shape} sines of {angles.shape}", cos)
    if count > 2 * _ROWS:  # positions repeat; a run without a cache is as long as the text
        ends = np.r_[:_ROWS, -_ROWS:0]
        angles, cosines, sines, flat = angles[ends], cosines[ends], sines[ends], flat[ends]
    inv_freq = angles[flat == 1][0]
    wanted = flat.astype(np.float32)[:, None] * inv_freq
    if not _agree(angles, wanted, _EXACT):
        raise NoMatch("the angle is not position times frequency", cos)
    scale = float(cosines[flat == 0].max())
    inv_freq = _spread(inv_freq, cosines, scale, flat, close, cos)
    for signed in (inv_freq, -inv_freq):
        wanted = (flat.astype(np.float32)[:, None] * signed).astype(np.float64)
        if _agree(sines, np.sin(wanted) * scale, close):
            return signed, scale
    raise NoMatch("it is not the sine of the angle", sin)


def _one_of_copies(angles: Array, count: int) -> Array:
    """The angles of one axis, where there are those of time, height and width, equal for text."""
    rows = angles[0]
    alike = angles.ndim > 2 and rows.size % count == 0 and bool((angles == rows).all())
    return rows if alike and rows[..., 0].size == count else angles


def _spread(
    inv_freq: Array, cosines: Array, scale: float, flat: Array, close: float, where: ir.Value
) -> Array:
    """Frequencies as wide as the table.

    Some make one cosine for a pair, and then double it; some double the angle, and then take half,
    and some double that again, in the other style.
    """
    forms = [inv_freq, np.tile(inv_freq, 2), np.repeat(inv_freq, 2)]
    if inv_freq.size % 2 == 0:
        first, every_other = halves(inv_freq, False)[0], halves(inv_freq, True)[0]
        forms += [first, every_other, np.repeat(first, 2), np.tile(every_other, 2)]
    for form in forms:
        wanted = np.cos((flat.astype(np.float32)[:, None] * form).astype(np.float64)) * scale
        if _agree(cosines, wanted, close):
            return form
    raise NoMatch("it is not the cosine of the angle", where)


def _agree(got: Array, wanted: Array, close: float) -> bool:
    return got.shape == wanted.shape and np.allclose(got, wanted, rtol=close, atol=close)


def _angle(prober: Prober, cos: ir.Value, sin: ir.Value) -> ir.Value:
    cosines = [node for node in _cone(prober, cos) if node.op_type == "Cos"]
    sines = [node for node in _cone(prober, sin) if node.op_type == "Sin"]
    if len(cosines) != 1 or len(sines) != 1 or cosines[0].inputs[0] is not sines[0].inputs[0]:
        raise NoMatch(
            f"{len(cosines)} Cos and {len(sines)} Sin make the tables, not one of each on one "
            "angle",
            cos,
        )
    angle = cosines[0].inputs[0]
    assert angle is not None
    return angle


def _cone(prober: Prober, value: ir.Value) -> list[ir.Node]:
    try:
        return prober.cut([value]).nodes
    except EvaluationError as error:
        raise NoMatch(f"the rotary table cannot be run alone: {error}", value) from error


def _integer_source(prober: Prober, angle: ir.Value) -> ir.Value:
    """The integers that the angle is computed from: what its making casts to float."""
    found: dict[ir.Value, None] = {}
    for node in _cone(prober, angle):
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is None or source.dtype not in _INTEGERS or known(source) is not None:
            continue
        if node.outputs[0].dtype not in _INTEGERS:
            found[source] = None
    if len(found) != 1:
        raise NoMatch(f"the angle is made of {len(found)} integer tensors, not one position", angle)
    return next(iter(found))


def _unrepeated(source: ir.Value) -> ir.Value:
    """The positions before they are given once for each axis, [3, B, S] of [B, S] (M-RoPE)."""
    sized = [dim for dim in shape_of(source) if dim != 1]
    for prefix in reversed(list(trace(source).prefixes())):
        shape = dims(prefix.source)
        if shape is None or len(shape) not in (1, 2) or prefix.source.dtype not in _INTEGERS:
            continue
        own = [dim for dim in shape if dim != 1]
        copies = sized[: len(sized) - len(own)]
        if len(copies) == 1 and isinstance(copies[0], int) and sized[1:] == own:
            return prefix.source
    return source


def _run(
    prober: Prober, part: Cutout, source: ir.Value, positions: Array, past: int
) -> tuple[Array, Array, Array, Array]:
    """Angle, cos and sin at chosen positions, and these positions, flat."""
    if source.dtype is None or source.name is None:
        raise EvaluationError("the position has no known dtype")
    asked = len(positions)
    bindings = prober.bindings(*prober.sizes(1, asked, past))
    if math.prod(sizes(source, bindings)) < asked:  # of an export that fixes the length
        bindings = prober.bindings(*prober.sizes(asked, asked, past))
    shape = sizes(source, bindings)
    flat = np.resize(positions, shape).astype(source.dtype.numpy())
    if flat.size < 2:
        raise EvaluationError("the export fixes a single position")
    angle, cos, sin = part.run({source.name: flat}, bindings)
    return angle, cos, sin, flat.ravel()


def _flat_position(source: ir.Value) -> ir.Value:
    """The position as [B, S], [1, S] or [S], before unit axes were put in."""
    target = shape_of(source)
    sized = [dim for dim in target if dim != 1]
    for prefix in trace(source).prefixes():
        shape = dims(prefix.source)
        if shape is None or len(shape) not in (1, 2):
            continue
        if sized == [dim for dim in shape if dim != 1] and is_same_movement(
            prefix, _with_axes_of(source)
        ):
            return prefix.source
    raise NoMatch(f"the position is {[str(n) for n in target]}, not [B, S]", source)


def _with_axes_of(source: ir.Value) -> Movement:
    def expected(array: Array, bindings: Mapping[str, int]) -> Array:
        return array.reshape(sizes(source, bindings))

    return expected


def build(
    op: Builder,
    interface: Interface,
    rotation: Rotation,
    pairs: Pairs,
    dtype: ir.DataType,
    *,
    reverse: bool = False,
) -> tuple[ir.Value, ir.Value]:
    """Tables cos and sin [B, S, R / 2] in `dtype`, the angle computed in float32.

    Args:
        op: Records the nodes.
        interface: Where the new tokens' ids are.
        rotation: What the tables hold.
        pairs: How the exported tables hold it.
        dtype: The dtype of what is rotated.
        reverse: Turn the other way.

    Raises:
        NoMatch: The positions are not those of the new tokens, or a pair has two frequencies.
    """
    position = rotation.position
    frequencies = rotation.frequencies(pairs)
    if reverse:  # cos(-a) is cos(a) and sin(-a) is -sin(a), to the bit
        frequencies = -frequencies
    ids = interface.tokens
    shape = shape_of(position)
    if shape != ids:  # one row for the whole batch
        if shape[-1] != ids[-1] or shape[:-1] not in ((), (1,)):
            raise NoMatch(
                f"the positions are {[str(n) for n in shape]}, those of the new tokens "
                f"{[str(n) for n in ids]}",
                position,
            )
        position = op.Expand(position, op.Shape(interface.input_ids, end=2))
    angle = op.Mul(
        op.Unsqueeze(op.Cast(position, to=int(ir.DataType.FLOAT)), [-1]), op.constant(frequencies)
    )
    tables: list[ir.Value] = []
    for table in (op.Cos(angle), op.Sin(angle)):
        exact = rotation.scale == 1.0
        scaled = table if exact else op.Mul(table, op.constant(np.float32(rotation.scale)))
        if rotation.rounded is not None:
            scaled = op.Cast(scaled, to=int(rotation.rounded))
        held = rotation.rounded or ir.DataType.FLOAT
        tables.append(scaled if dtype == held else op.Cast(scaled, to=int(dtype)))
    return tables[0], tables[1]
