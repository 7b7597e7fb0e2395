"""NaN and infinity in weights are seen while they are written, in bounded memory."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from omforge import ir
from omforge.ir.nonfinite import nonfinite, worse
from omforge.ir.weights import WeightWriter

DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 1 << 15, 99_999])
def test_one_element_is_found(dtype: type, at: int) -> None:
    array = np.linspace(-30_000, 30_000, 100_000).astype(dtype)
    kind = ir.DataType.from_numpy(array.dtype)
    assert nonfinite(kind, array.tobytes()) == ""
    for value, said in ((np.inf, "infinity"), (-np.inf, "infinity"), (np.nan, "NaN")):
        array[at] = value
        assert nonfinite(kind, array.tobytes()) == said
    array[(at + 1) % 100_000] = -np.inf
    assert nonfinite(kind, memoryview(array.tobytes())) == "NaN"


def test_what_is_no_float_has_none() -> None:
    assert nonfinite(ir.DataType.INT32, b"\xff" * 64) == ""
    assert nonfinite(ir.DataType.FLOAT, b"") == ""
    assert worse("", "infinity") == worse("infinity", "") == "infinity"
    assert worse("infinity", "NaN") == worse("NaN", "") == "NaN"


def test_a_writer_keeps_the_names(tmp_path: Path) -> None:
    """Of what goes into the file, and of what is so small that it stays in the graph."""
    arrays = {
        "whole": np.ones(600, np.float32),
        "large": np.full(600, np.inf, np.float32),
        "small": np.full(2, np.nan, np.float32),
        "half": np.ones(5 << 20, np.float16),
    }
    arrays["half"][-1] = np.nan
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 18]>
        g (float[2] x) => (float[2] y) { y = Neg (x) }""")
    for name, array in arrays.items():
        tensor = ir.tensor(array, name=name)
        model.graph.register_initializer(ir.Value(name=name, const_value=tensor))
    with WeightWriter(tmp_path / "w") as writer:
        ir.save(model, tmp_path / "m.onnx", writer=writer)
    assert writer.nonfinite == {"large": "infinity", "small": "NaN", "half": "NaN"}
