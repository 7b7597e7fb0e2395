"""Small real exports for tests: the graphs as the exporters wrote them, the weights from a seed.

`fixtures/exports/<route>/<family>` holds two-layer models (hidden 64, vocabulary 320, fp32) without
their weights; `fixtures/strip_exports.py` made them.
"""

import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

FIXTURES = Path(__file__).parent / "fixtures" / "exports"
ROUTES = ("optimum", "dynamo", "hfexporter", "torchscript-op17")
FAMILIES = ("llama_mha", "llama_gqa", "qwen2", "mistral")
"""Llama and what is spelled like it: there by every route."""
EXPORTS = tuple(
    sorted((file.parent.parent.name, file.parent.name) for file in FIXTURES.glob("*/*/model.onnx"))
)
"""Every (route, family) there is."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


ENCODERS = FIXTURES.parent / "encoders"
"""The same of models that are no causal decoder with token ids, `<route>/<family>`."""

ENCODER_DECODERS = FIXTURES.parent / "encoder_decoders"
"""Decoders that attend to an encoder's states, `<route>/<family>`."""


def export(route: str, family: str, folder: Path, base: Path = FIXTURES) -> Path:
    """Write a complete export into `folder`: model.onnx, config.json and the tokenizer.

    The same arguments give the same bytes; `base` is where the fixture lies.

    Returns:
        The path of model.onnx.
    """
    source = base / route / family
    config = json.loads((source / "config.json").read_text())
    model = onnx.load(source / "model.onnx")
    stripped = [t for t in _tensors(model) if _is_stripped(t)]
    for index, tensor in enumerate(stripped):
        _fill(tensor, _weights(tensor, index))
    if config.get("tie_word_embeddings"):
        _tie(stripped, config["vocab_size"], config["hidden_size"])
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    shutil.copyfile(source / "config.json", folder / "config.json")
    for name in TOKENIZER:
        shutil.copyfile(FIXTURES / name, folder / name)
    return folder / "model.onnx"


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Return the initializers, then the nodes' tensors, each of these named after its output."""
    found = list(model.graph.initializer)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                attribute.t.name = attribute.t.name or node.output[0]
                found.append(attribute.t)
    return found


def _is_stripped(tensor: onnx.TensorProto) -> bool:
    data = (tensor.raw_data, tensor.float_data, tensor.double_data)
    more = (tensor.int32_data, tensor.int64_data, tensor.uint64_data, tensor.string_data)
    return math.prod(tensor.dims) > 0 and not any(data) and not any(more)


def _weights(tensor: onnx.TensorProto, index: int) -> np.ndarray:
    shape = tuple(tensor.dims)
    seed = zlib.crc32(f"{index} {shape}".encode())
    noise = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    if len(shape) > 1:
        return 0.15 * noise  # the deviation that the exports were made with
    is_norm = "norm" in tensor.name.lower() and "weight" in tensor.name
    return 0.1 * noise + (1.0 if is_norm else 0.0)


def _fill(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.raw_data = np.ascontiguousarray(values.astype(dtype)).tobytes()


def _tie(tensors: list[onnx.TensorProto], vocab: int, hidden: int) -> None:
    """Make every copy of the embedding, as it stands or transposed, equal to the first."""
    embeddings = [t for t in tensors if tuple(t.dims) == (vocab, hidden)]
    heads = [t for t in tensors if tuple(t.dims) == (hidden, vocab)]
    if not embeddings:
        return
    values = numpy_helper.to_array(embeddings[0])
    for tensor in embeddings[1:]:
        _fill(tensor, values)
    for tensor in heads:
        _fill(tensor, values.T)
