"""Mixed precision in a budget, beside other ways to spend the same bytes: perplexity on a text.

Run by hand, on a folder with `model.onnx` and `tokenizer.json`:

    python benchmarks/quantize_budget.py FOLDER [--group 64] [--share 0.5] [--method rtn|hqq]
        [--calibration TEXT] [--test TEXT] [--pieces 8]

The budget lies at a share of the way from all layers in int4 to all in int8, and counts the layers'
integers and float16 scales. Every row has at most these bytes; each is a canonical graph, run by
ONNX Runtime on pieces of 256 tokens, each a prompt of its own.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from omforge import ir
from omforge.compilation.quantize_options import read_calibration
from omforge.passes import make_pipeline
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.quantization.blockwise import Scheme, quantize
from omforge.quantization.budget import Option, assign
from omforge.quantization.hqq import quantize_hqq
from omforge.quantization.linear import Linear, find_linears
from omforge.quantization.mixed import Storage
from omforge.quantization.sensitivity import Sensitivity, measure_sensitivity
from omforge.quantization.tensors import QuantizedWeight
from omforge.recognition.feeds import token_feeds

TEXTS = Path(__file__).parents[1] / "examples" / "texts"
QUANTIZERS = {"rtn": quantize, "hqq": quantize_hqq}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("folder", type=Path)
    words.add_argument("--group", type=int, default=64)
    words.add_argument("--share", type=float, default=0.5)
    words.add_argument("--method", choices=QUANTIZERS, default="rtn")
    words.add_argument("--calibration", type=Path, default=TEXTS / "python_docs_calibration.txt")
    words.add_argument("--test", type=Path, default=TEXTS / "python_docs_test.txt")
    words.add_argument("--pieces", type=int, default=8)
    given = words.parse_args()

    model = ir.load(given.folder / "model.onnx")
    make_pipeline("raise").run(model)
    linears = find_linears(model)
    schemes = (Scheme(4, given.group), Scheme(8, 0))
    quantizer = QUANTIZERS[given.method]
    storage = Storage(lambda _: 0, width=2, wide_zeros=True)
    sizes = [[storage.nbytes(linear, scheme) for scheme in (*schemes, None)] for linear in linears]
    test = read_calibration(given.test, given.folder)[: given.pieces]
    count = len(linears)
    least, most = (sum(each[i] for each in sizes) for i in (0, 1))
    budget = int(least + given.share * (most - least))
    print(f"{count} layers, {least:,} bytes in int4, {most:,} in int8; budget {budget:,}\n")
    print("assignment             int4  int8  float        bytes  perplexity")

    def show(name: str, chosen: Sequence[int]) -> None:
        taken = [(*schemes, None)[index] for index in chosen]
        size = sum(each[i] for each, i in zip(sizes, chosen, strict=True))
        kinds = [list(chosen).count(i) for i in range(3)]
        result = perplexity(model, linears, taken, quantizer, test)
        print(f"{name:20}{kinds[0]:7}{kinds[1]:6}{kinds[2]:7}{size:13,}{result:12.3f}", flush=True)

    show("floats", [2] * count)
    show("all int8", [1] * count)
    show("all int4", [0] * count)
    started = time.process_time()
    tokens = read_calibration(given.calibration, given.folder)
    measured = measure_sensitivity(model, linears, schemes, tokens, quantizer=quantizer)
    took = time.process_time() - started
    show("by divergence", planned(linears, sizes, measured, budget))
    plain = {name: Sensitivity(each.weights) for name, each in measured.items()}
    show("by weight error", planned(linears, sizes, plain, budget))
    outputs = {name: Sensitivity(each.outputs) for name, each in measured.items()}
    show("by output error", planned(linears, sizes, outputs, budget))
    for name, order in orders(count):
        show(name, in_order(sizes, order, budget))
    print(f"\nmeasuring took {took:.0f} s of CPU time")


def planned(
    linears: Sequence[Linear],
    sizes: Sequence[Sequence[int]],
    measured: dict[str, Sensitivity],
    budget: int,
) -> Sequence[int]:
    options = [
        [Option(size, cost) for size, cost in zip(each, (*measured[x.name].costs, 0), strict=True)]
        for x, each in zip(linears, sizes, strict=True)
    ]
    return assign(options, budget).chosen


def orders(count: int) -> Iterator[tuple[str, Sequence[int]]]:
    yield "first layers", range(count)
    yield "last layers", range(count)[::-1]
    for seed in range(2):
        yield f"random, seed {seed}", np.random.default_rng(seed).permutation(count).tolist()


def in_order(sizes: Sequence[Sequence[int]], order: Sequence[int], budget: int) -> Sequence[int]:
    """int8 for one layer after the other, as long as it fits."""
    chosen = [0] * len(sizes)
    left = budget - sum(each[0] for each in sizes)
    for layer in order:
        more = sizes[layer][1] - sizes[layer][0]
        if more <= left:
            left -= more
            chosen[layer] = 1
    return chosen


def perplexity(
    model: ir.Model,
    linears: Sequence[Linear],
    schemes: Sequence[Scheme | None],
    quantizer: object,
    pieces: Sequence[np.ndarray],
) -> float:
    made = model.clone()
    given = {
        x.name: QuantizedWeight(x.weight.const_value, x.axis, scheme, quantizer=quantizer)
        for x, scheme in zip(linears, schemes, strict=True)
        if scheme is not None
    }
    QuantizeWeights(given=given).run(made)
    losses: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        ir.save(made, Path(folder) / "model.onnx", external="model.bin")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            Path(folder) / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        for piece in pieces:
            (logits,) = session.run(["logits"], token_feeds(model, piece[None]))
            rows = logits[0, :-1].astype(np.float64)
            rows -= rows.max(-1, keepdims=True)
            chances = rows[np.arange(len(rows)), piece[1:]] - np.log(np.exp(rows).sum(-1))
            losses.append(-chances)
    return float(np.exp(np.concatenate(losses).mean()))


if __name__ == "__main__":
    main()
