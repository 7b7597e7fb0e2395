"""The two ways into ATC."""

from __future__ import annotations

from typing import Literal

Front = Literal["onnx", "air", "ort"]
"""What atc is given: ONNX graphs (--framework=5), or GE graphs (--framework=1); or what ONNX
Runtime is given on a CPU: ONNX with operators of its own."""
