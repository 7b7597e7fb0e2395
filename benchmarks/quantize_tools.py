"""The tools that `quantize.py` runs: `quantize_tools.py TOOL OUT IN BITS GROUP SIZE`.

The last line that a tool prints is `told key=value ...`.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PIECE = 8 << 20


def copy(folder: Path, output: Path, bits: int, group: int, size: int) -> str:
    """Read all weights, and write as many bytes as omforge does (all of them at first)."""
    weights = [file for file in folder.iterdir() if file.name.startswith("model.onnx")]
    left = size or sum(file.stat().st_size for file in weights)
    buffer = bytearray(PIECE)
    with open(output / "copy.bin", "wb") as sink:
        for file in weights:
            with open(file, "rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if left > 0:
                        sink.write(memoryview(buffer)[: min(count, left)])
                        left -= count
    return ""


def omforge(folder: Path, output: Path, bits: int, group: int, size: int, clip: str = "mse") -> str:
    """Round to nearest on the export as it is, written to one file of weights."""
    from omforge import ir
    from omforge.passes.quantization.report import quantized_layers
    from omforge.passes.quantize_weights import QuantizeWeights

    model = ir.load(folder / "model.onnx")
    from omforge.passes import make_pipeline

    make_pipeline("convert-opset").run(model, ())
    QuantizeWeights(bits, group, clip=clip).run(model)  # pyright: ignore[reportArgumentType]
    ir.save(model, output / "model.onnx", external="model.bin")
    return f"layers={len(quantized_layers(model))}"


def omforge_minmax(folder: Path, output: Path, bits: int, group: int, size: int) -> str:
    """The same, without a search for the best clipping: what most tools call round-to-nearest."""
    return omforge(folder, output, bits, group, size, clip="none")


def omforge_numpy(folder: Path, output: Path, bits: int, group: int, size: int) -> str:
    """As where numba is not installed."""
    sys.modules["numba"] = None  # pyright: ignore[reportArgumentType]  makes its import fail
    return omforge(folder, output, bits, group, size)


def omforge_cold(folder: Path, output: Path, bits: int, group: int, size: int) -> str:
    """As on the first run after an installation: numba has compiled nothing yet."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NUMBA_CACHE_DIR"] = cache
        return omforge(folder, output, bits, group, size)


def ort(folder: Path, output: Path, bits: int, group: int, size: int) -> str:
    """ONNX Runtime's MatMulNBits quantizer, round to nearest."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(folder / "model.onnx"), bits=bits, block_size=group, is_symmetric=True
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(output / "model.onnx"), use_external_data_format=True)
    nodes = quantizer.model.model.graph.node
    return f"layers={sum(node.op_type == 'MatMulNBits' for node in nodes)}"


@dataclass(frozen=True)
class Tool:
    """A function to call, and whether it needs our environment rather than the peers'."""

    call: Callable[[Path, Path, int, int, int], str]
    ours: bool


TOOLS = {
    "copy": Tool(copy, ours=True),
    "omforge": Tool(omforge, ours=True),
    "omforge-minmax": Tool(omforge_minmax, ours=True),
    "omforge-numpy": Tool(omforge_numpy, ours=True),
    "omforge-cold": Tool(omforge_cold, ours=True),
    "ort": Tool(ort, ours=False),
}


def main() -> None:
    name, output, folder, bits, group, size = sys.argv[1:]
    told = TOOLS[name].call(Path(folder), Path(output), int(bits), int(group), int(size))
    print(f"told {told}", flush=True)
    os.sync()


if __name__ == "__main__":
    main()
