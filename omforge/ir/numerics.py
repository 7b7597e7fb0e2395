"""How equal is equal: tolerances by dtype in one table, and ONNX Runtime to get the numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx_ir

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    """`|a - b| <= atol + rtol * |b|`, element by element, b being the reference."""

    rtol: float
    atol: float


TOLERANCES: Mapping[str, Tolerance] = {
    # A rewrite changes the order of a few sums; logits are O(10).
    "float32": Tolerance(rtol=1e-4, atol=1e-4),
    # 11 bits of mantissa and two roundings a layer; logits are O(10).
    "float16": Tolerance(rtol=2e-2, atol=5e-2),
    # 8 bits of mantissa, so steps eight times as wide; the row allows five times the one above. (Of
    # two-layer models for Ascend910B4 logits are off by up to 0.18 where float16's are by 0.02.)
    "bfloat16": Tolerance(rtol=1e-1, atol=2e-1),
    "float64": Tolerance(rtol=1e-7, atol=1e-9),
}
"""The one table of tolerances. Other dtypes (integers, booleans) must be equal to the bit."""

_LEVEL = "accuracy_level"

EXACT = Tolerance(rtol=0.0, atol=0.0)


def tolerance(dtype: str) -> Tolerance:
    """The tolerance of a numpy dtype name."""
    return TOLERANCES.get(dtype, EXACT)


def max_abs_diff(actual: Array, expected: Array) -> float:
    """The largest absolute difference; infinite if shapes differ or one side alone is NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    if not actual.size:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    same = _same(actual, expected)
    if np.isnan(np.where(same, 0.0, difference)).any():
        return float("inf")
    # float64 does not tell large integers apart, and they differ by 1 at least.
    least = 1.0 if actual.dtype.kind in "iu" else 0.0
    return float(np.where(same, 0.0, np.maximum(difference, least)).max())


def _same(actual: Array, expected: Array) -> npt.NDArray[np.bool_]:
    """Where both are equal, or NaN."""
    if actual.dtype != expected.dtype:
        actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    return (actual == expected) | ((actual != actual) & (expected != expected))


def within(actual: Array, expected: Array, allowed: Tolerance) -> bool:
    """Whether every element of `actual` is within the tolerance of `expected`."""
    if actual.shape != expected.shape:
        return False
    if allowed == EXACT:
        return bool(_same(actual, expected).all())
    wide = actual.astype(np.float64), expected.astype(np.float64)
    with np.errstate(over="ignore"):
        return np.allclose(*wide, rtol=allowed.rtol, atol=allowed.atol, equal_nan=True)


def at_full_accuracy(model: onnx_ir.Model) -> onnx_ir.Model:
    """The model with no leave to round what its layers read; itself if none of them has it.

    With `accuracy_level` a com.microsoft operator says how coarse its input may become: ONNX
    Runtime makes int8 of it at level 4. That is its choice and not what the graph computes.
    """

    def coarse(given: onnx_ir.Model) -> list[onnx_ir.Node]:
        graphs = (given.graph, *given.functions.values())
        return [node for each in graphs for node in each.all_nodes() if _LEVEL in node.attributes]

    if not coarse(model):
        return model
    copy = model.clone()
    for node in coarse(copy):
        del node.attributes[_LEVEL]
    return copy


def run(model: onnx_ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a model on ONNX Runtime's CPU provider; outputs by name.

    Large weights go through a temporary file, so that models over protobuf's 2 GiB run too. Every
    layer runs at full accuracy (see `at_full_accuracy`).
    """
    import onnxruntime  # slow to import, and most of `ir` never runs a model

    from omforge.ir.bfloat16 import computed_wide, run_session
    from omforge.ir.files import save

    runtime: Any = onnxruntime  # its stub is incomplete
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    # ONNX Runtime fuses norms and attention by itself, and would hide what a pass moved.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory(prefix="omforge-") as folder:
        path = Path(folder) / "model.onnx"
        save(computed_wide(at_full_accuracy(model)), path, external="model.bin")
        session: Any = runtime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        used = {given.name for given in session.get_inputs()}
        results = run_session(session, names, {k: v for k, v in feeds.items() if k in used})
    return dict(zip(names, results, strict=True))
