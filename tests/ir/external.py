"""A tensor in a file of its own."""

from pathlib import Path

import numpy as np
import onnx_ir

from omforge.ir.weights import external_like


def mapped(tmp_path: Path, offset: int, count: int) -> tuple[onnx_ir.ExternalTensor, np.ndarray]:
    numbers = np.arange(count, dtype=np.float32)
    (tmp_path / "w.bin").write_bytes(bytes(offset) + numbers.tobytes())
    return external_like(onnx_ir.tensor(numbers, name="w"), tmp_path, "w.bin", offset), numbers
