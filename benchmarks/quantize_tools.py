"""The tools that `quantize.py` runs: `quantize_tools.py TOOL OUT IN BITS GROUP SIZE`.

The last line that a tool prints is `told key=value ...`. Peers read what `plain` wrote.
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


def plain(folder: Path, output: Path, bits: int, group: int, size: int) -> str:
    """Write what peers can read: opset 21, the first with int4, and no Transpose behind a weight.

    They quantise products by an initializer only. A weight that others read too stays as it is.
    """
    from omforge import ir
    from omforge.passes.convert_opset import ConvertOpset

    model = ir.load(folder / "model.onnx")
    ConvertOpset(21).run(model)
    for node in [node for node in model.graph if node.op_type == "Transpose"]:
        weight, made = node.inputs[0], node.outputs[0]
        if weight is None or not weight.is_initializer() or len(weight.uses()) > 1:
            continue
        tensor = weight.const_value
        assert tensor is not None
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
        turned = ir.LazyTensor(
            lambda tensor=tensor, order=order, name=made.name: ir.Tensor(
                tensor.numpy().transpose(order).copy(), name=name
            ),
            dtype=tensor.dtype,
            shape=ir.Shape(made.shape or tuple(reversed(tensor.shape.numpy()))),
            name=made.name,
        )
        value = ir.Value(name=f"{made.name}_plain", type=made.type, const_value=turned)
        value.shape = turned.shape
        model.graph.register_initializer(value)
        made.replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
        del model.graph.initializers[weight.name or ""]
    ir.save(model, output / "model.onnx", external="model.data")
    return ""


def omforge(folder: Path, output: Path, bits: int, group: int, size: int, clip: str = "mse") -> str:
    """Round to nearest on the export as it is, written to one file of weights."""
    from omforge import ir
    from omforge.cli import console
    from omforge.passes.quantize_weights import QuantizeWeights
    from omforge.quantization.report import quantized_layers

    console.collect_seldom()  # as the command line does
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


def modelopt(folder: Path, output: Path, bits: int, group: int, size: int) -> str:
    """NVIDIA ModelOpt's INT4 quantiser, round to nearest."""
    import onnx
    from modelopt.onnx.quantization.int4 import quantize

    made = quantize(
        str(folder / "model.onnx"),
        calibration_method="rtn_dq",
        calibration_eps=["cpu"],
        block_size=group,
        nodes_to_exclude=[],
    )
    onnx.save(made, output / "model.onnx", save_as_external_data=True, location="model.data")
    return f"layers={sum(node.op_type == 'DequantizeLinear' for node in made.graph.node)}"


def olive(folder: Path, output: Path, bits: int, group: int, size: int) -> str:
    """Olive's round to nearest, into MatMulNBits."""
    import onnx
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.rtn_quantization import OnnxBlockWiseRtnQuantization

    options = {"bits": bits, "block_size": group, "is_symmetric": True}
    step = create_pass_from_dict(OnnxBlockWiseRtnQuantization, options, disable_search=True)
    made = step.run(ONNXModelHandler(str(folder / "model.onnx")), str(output / "model.onnx"))
    graph = onnx.load(made.model_path, load_external_data=False).graph
    return f"layers={sum(node.op_type == 'MatMulNBits' for node in graph.node)}"


def nncf(folder: Path, output: Path, bits: int, group: int, size: int) -> str:
    """NNCF's weight compression, symmetric."""
    import nncf
    import onnx

    model = onnx.load(folder / "model.onnx")
    mode = nncf.CompressWeightsMode.INT4_SYM
    made = nncf.compress_weights(model, mode=mode, group_size=group, all_layers=True)
    onnx.save(made, output / "model.onnx", save_as_external_data=True, location="model.data")
    return f"layers={sum(node.op_type == 'DequantizeLinear' for node in made.graph.node)}"


@dataclass(frozen=True)
class Tool:
    """A function to call, and in whose environment: ours, or that of a peer of this name."""

    call: Callable[[Path, Path, int, int, int], str]
    peer: str = ""


TOOLS = {
    "plain": Tool(plain),
    "copy": Tool(copy),
    "omforge": Tool(omforge),
    "omforge-minmax": Tool(omforge_minmax),
    "omforge-numpy": Tool(omforge_numpy),
    "omforge-cold": Tool(omforge_cold),
    "ort": Tool(ort, "ort"),
    "modelopt": Tool(modelopt, "modelopt"),
    "olive": Tool(olive, "olive"),
    "nncf": Tool(nncf, "nncf"),
}


def main() -> None:
    name, output, folder, bits, group, size = sys.argv[1:]
    told = TOOLS[name].call(Path(folder), Path(output), int(bits), int(group), int(size))
    print(f"told {told}", flush=True)
    os.sync()


if __name__ == "__main__":
    main()
