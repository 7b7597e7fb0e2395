"""What a quantised file makes of its weights: `quantize_error.py FOLDER PLAIN OUT`.

Every eighth quantised matrix, in the order of the graph, is decoded and compared with the export's:
the square root of the squared errors' sum over that of the squared weights. The formats are
DequantizeLinear, by groups or per channel, and ONNX Runtime's MatMulNBits. `PLAIN` is the folder
that the peers were given; a name there begins the name of what became of it.

The last line printed is `told error=...`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

STEP = 8


class Weights:
    """The initializers of a model, each read from its file when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        self._folder = folder
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}

    def read(self, name: str) -> Any:
        """Return the array of a name."""
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self.tensors[name])
        return numpy_helper.to_array(tensor, str(self._folder))


def decoded(made: Weights) -> Iterator[tuple[str, Any, bool]]:
    """Yield the name of some quantised weights, what they stand for, and whether it is [N, K]."""
    nodes = [
        node
        for node in made.graph.node
        if node.op_type == "MatMulNBits"
        or (node.op_type == "DequantizeLinear" and len(made.tensors[node.input[0]].dims) == 2)
    ]
    for node in nodes[::STEP]:
        given = {item.name: item.i for item in node.attribute}
        parts = [np.float32(made.read(name)) if name else None for name in node.input[2:]]
        if node.op_type == "DequantizeLinear":
            yield node.input[0], _linear(made, node, given), False
        else:
            codes, scale = made.read(node.input[1]), made.read(node.input[2])
            groups, size = codes.shape[1], given["block_size"]
            pairs = np.stack([codes & 15, codes >> 4], -1).reshape(-1, groups, size)
            if parts[1:]:
                raise SystemExit("zero points of MatMulNBits are not read")
            wide = (np.float32(pairs) - 8) * np.float32(scale).reshape(-1, groups, 1)
            yield node.input[1], wide.reshape(len(wide), -1)[:, : given["K"]], True


def _linear(made: Weights, node: onnx.NodeProto, given: dict[str, int]) -> Any:
    codes = np.float32(made.read(node.input[0]))
    axis, size = given.get("axis", 1) % codes.ndim, given.get("block_size", 0)

    def spread(name: str) -> Any:
        part = np.float32(made.read(name))
        if size:
            part = part.repeat(size, axis)
            return part[: codes.shape[0], : codes.shape[1]]
        return np.expand_dims(part, 1 - axis) if part.ndim == 1 else part

    if len(node.input) > 2 and node.input[2]:
        codes = codes - spread(node.input[2])
    return codes * spread(node.input[1])


def error(folder: Path, plain: Path, output: Path) -> float:
    """Return the relative error of the weights in a quantised model."""
    sources = (Weights(folder), Weights(plain))
    squared = total = 0.0
    for name, weight, turned in decoded(Weights(output)):
        source, known = max(
            (
                (source, known)
                for source in sources
                for known in source.tensors
                if name.startswith(known)
            ),
            key=lambda pair: len(pair[1]),
        )
        exact = np.float32(source.read(known))
        difference = (exact.T if turned else exact) - weight
        squared += float(np.square(difference, dtype=np.float64).sum())
        total += float(np.square(exact, dtype=np.float64).sum())
    return (squared / total) ** 0.5


def main() -> None:
    folder, plain, output = map(Path, sys.argv[1:])
    print(f"told error={error(folder, plain, output):.4f}", flush=True)


if __name__ == "__main__":
    main()
