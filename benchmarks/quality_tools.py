"""The jobs that `quantize_quality.py` runs, each in a process of its own.

    quality_tools.py prepare WORK FOLDER CALIBRATION TEST TOKENS PIECES TEST_PIECES
        HEAD SHUFFLE EVERY
    quality_tools.py evaluate WORK OUT
    quality_tools.py TOOL WORK OUT BITS GROUP SYMMETRIC METHOD

`WORK` is what `prepare` made: the peers' model, and the texts as inputs of the graph. The last line
that a job prints is `told key=value ...`.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# --- what needs omforge ---------------------------------------------------------------------------


def prepare(
    work: Path,
    folder: Path,
    calibration: Path,
    test: Path,
    tokens: int,
    pieces: int,
    test_pieces: int,
    head: bool,
    shuffle: bool,
    every: int,
) -> str:
    """Write the texts as feeds, and the model that the peers are given."""
    from tokenizers import Tokenizer

    from omforge import ir
    from omforge.recognition.feeds import token_feeds

    if shuffle:
        folder = _shuffled(folder, work / "source")
    model = ir.load(folder / "model.onnx")
    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name, text, count in (("calibration", calibration, pieces), ("test", test, test_pieces)):
        ids = np.array(tokenizer.encode(text.read_text()).ids)
        rows = ids[: len(ids) // tokens * tokens].reshape(-1, tokens)
        rows = rows[:: max(1, len(rows) // count)][:count]
        np.save(work / f"{name}.npy", rows)
        for index, row in enumerate(rows):
            np.savez(work / f"{name}_{index}.npz", **token_feeds(model, row[None]))
    (work / "source.txt").write_text(str(folder.resolve()))
    kept = _write_plain(folder, work / "plain", head, every)
    (work / "keep.txt").write_text("\n".join(kept))
    return ""


def _shuffled(folder: Path, output: Path) -> Path:
    """Write the export with its channels in another order."""
    from shuffle import shuffled

    from omforge import ir
    from omforge.passes import make_pipeline

    canonical = ir.load(folder / "model.onnx")
    make_pipeline("raise").run(canonical, ())
    model = ir.load(folder / "model.onnx")
    for name, array in shuffled(canonical).items():
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
    output.mkdir()
    shutil.copy(folder / "tokenizer.json", output)
    ir.save(model, output / "model.onnx", external="model.data")
    return output


def _write_plain(folder: Path, output: Path, head: bool, every: int) -> list[str]:
    """Write what the peers are given; the names of the weights that stay in floats.

    Peers quantise products by an initializer only: a transposed one becomes a matrix of its own
    with `head`, and what shall stay goes through an Identity.
    """
    import onnx
    from onnx.version_converter import convert_version

    # Opset 21 is the first with int4, and with DequantizeLinear by groups.
    model = convert_version(onnx.load(folder / "model.onnx"), 21)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    kept: list[str] = []
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]:
        if not head:
            kept.append(node.input[0])
            continue
        order: Any = list(node.attribute[0].ints) if node.attribute else None
        array = onnx.numpy_helper.to_array(weights[node.input[0]]).transpose(order)
        graph.initializer.append(onnx.numpy_helper.from_array(array.copy(), node.output[0]))
        graph.node.remove(node)
    products = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    for index, node in enumerate(products):
        if index % every:
            name = node.input[1]
            kept.append(name)
            node.input[1] = f"{name}_kept"
            # Named, because ORT's quantiser tells nodes apart by their names.
            made = onnx.helper.make_node("Identity", [name], [node.input[1]], f"{name}_kept")
            graph.node.insert(0, made)
    output.mkdir()
    onnx.save(model, output / "model.onnx", save_as_external_data=True, location="model.data")
    return kept


def evaluate(work: Path, output: Path) -> str:
    """Measure the perplexity of the test text, and the mean divergence from the export's logits."""
    kept = work / "logits.npy"
    if not kept.exists():
        whole: Any = None
        rows = len(np.load(work / "test.npy"))
        for index, (_, logits) in enumerate(_logits(work, _source(work))):
            if whole is None:
                shape = (rows, *logits.shape)
                whole = np.lib.format.open_memmap(kept, "w+", np.float32, shape)
            whole[index] = logits
        del whole
    exact: Any = np.load(kept, "r")
    losses: list[Any] = []
    divergences: list[Any] = []
    for reference, (row, logits) in zip(exact, _logits(work, output), strict=True):
        losses.append(-logits[np.arange(len(logits)), row[1:]])
        divergences.append((np.exp(reference) * (reference - logits)).sum(-1))
    perplexity = np.exp(np.concatenate(losses).mean())
    return f"perplexity={perplexity:.4f} divergence={np.concatenate(divergences).mean():.6f}"


def _logits(work: Path, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Yield each piece of the test text [S], and the log probabilities [S - 1, V] behind it.

    Every tool's graph gets the same session options.
    """
    import onnxruntime

    runtime: Any = onnxruntime
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # No fusions that differ between the tools' ways to write a quantised product.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    path = str(folder / "model.onnx")
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    for row, feeds in zip(np.load(work / "test.npy"), _feeds(work, "test"), strict=True):
        given = {name: array for name, array in feeds.items() if name in names}
        logits = session.run(["logits"], given)[0][0, :-1]
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True, dtype=np.float64))
        yield row, logits


def omforge(work: Path, output: Path, bits: int, group: int, symmetric: bool, method: str) -> str:
    """Raise the export, and quantise the layers that the peers can, or all of them."""
    from omforge import ir
    from omforge.passes import make_pipeline
    from omforge.passes.quantize_weights import QuantizeWeights
    from omforge.quantization.report import quantized_layers

    model = ir.load(_source(work) / "model.onnx")
    make_pipeline("raise").run(model, ())
    keep = tuple((work / "keep.txt").read_text().split())
    options: Any = {"bits": bits, "method": method, "keep": keep}
    tokens = list(np.load(work / "calibration.npy"))
    QuantizeWeights(group=group, symmetric=symmetric, tokens=tokens, **options).run(model)
    ir.save(model, output / "model.onnx", external="model.bin")
    return f"layers={len(quantized_layers(model))}"


def export(work: Path, output: Path, bits: int, group: int, symmetric: bool, method: str) -> str:
    """Copy the export: what all others are compared with."""
    shutil.copytree(_source(work), output, dirs_exist_ok=True)
    return "layers=0"


# --- peers ----------------------------------------------------------------------------------------


class Reader:
    """The calibration text as the peers read one: `get_next`, or an iterator."""

    def __init__(self, work: Path) -> None:
        self._feeds = list(_feeds(work, "calibration"))
        self.rewind()

    def rewind(self) -> None:
        """Start again."""
        self._next = iter(self._feeds)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next piece's inputs; None behind the last."""
        return next(self._next, None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._feeds)

    def get_first(self) -> dict[str, Any]:
        """Return the first piece's inputs."""
        return self._feeds[0]


def ort(work: Path, output: Path, bits: int, group: int, symmetric: bool, method: str) -> str:
    """ONNX Runtime's MatMulNBits quantizer."""
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizers

    configs: dict[str, Callable[[], Any]] = {
        "rtn": lambda: None,
        "hqq": lambda: quantizers.HQQWeightOnlyQuantConfig(block_size=group, bits=bits),
        "gptq": lambda: quantizers.GPTQWeightOnlyQuantConfig(Reader(work)),  # pyright: ignore[reportArgumentType]
        "k_quant": lambda: quantizers.KQuantWeightOnlyQuantConfig(),
    }
    quantizer = quantizers.MatMulNBitsQuantizer(
        onnx.load(work / "plain" / "model.onnx"),
        bits=bits,
        block_size=group,
        is_symmetric=symmetric,
        algo_config=configs[method](),
    )
    quantizer.process()
    made: Any = quantizer.model
    onnx.save(made.model, output / "model.onnx", save_as_external_data=True, location="model.data")
    return f"layers={sum(node.op_type == 'MatMulNBits' for node in made.model.graph.node)}"


def modelopt(work: Path, output: Path, bits: int, group: int, symmetric: bool, method: str) -> str:
    """NVIDIA ModelOpt's INT4 quantiser."""
    import onnx
    from modelopt.onnx.quantization.int4 import quantize

    made: Any = quantize(
        str(work / "plain" / "model.onnx"),
        calibration_method=method,
        calibration_data_reader=Reader(work),
        calibration_eps=["cpu"],
        use_zero_point=not symmetric,
        block_size=group,
        nodes_to_exclude=[],
    )
    onnx.save(made, output / "model.onnx", save_as_external_data=True, location="model.data")
    return f"layers={sum(node.op_type == 'DequantizeLinear' for node in made.graph.node)}"


def _feeds(work: Path, name: str) -> Iterator[dict[str, Any]]:
    for index in range(len(np.load(work / f"{name}.npy"))):
        with np.load(work / f"{name}_{index}.npz") as arrays:
            yield dict(arrays)


def _source(work: Path) -> Path:
    return Path((work / "source.txt").read_text())


@dataclass(frozen=True)
class Tool:
    """What to call, and in whose environment: "omforge", "peers" or "modelopt"."""

    call: Callable[[Path, Path, int, int, bool, str], str]
    environment: str


TOOLS = {
    "export": Tool(export, "omforge"),
    "omforge": Tool(omforge, "omforge"),
    "ort": Tool(ort, "peers"),
    "modelopt": Tool(modelopt, "modelopt"),
}


def main() -> None:
    job, work, *rest = sys.argv[1:]
    if job == "prepare":
        texts = (Path(rest[0]), Path(rest[1]), Path(rest[2]))
        sizes = (int(rest[3]), int(rest[4]), int(rest[5]))
        flags = (rest[6] == "True", rest[7] == "True")
        told = prepare(Path(work), *texts, *sizes, *flags, int(rest[8]))
    elif job == "evaluate":
        told = evaluate(Path(work), Path(rest[0]))
    else:
        output, bits, group, symmetric, method = rest
        given = (int(bits), int(group), symmetric == "True", method)
        told = TOOLS[job].call(Path(work), Path(output), *given)
    print(f"told {told}", flush=True)
    os.sync()


if __name__ == "__main__":
    main()
