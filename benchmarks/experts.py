"""What a mixture of experts costs a decode step: all experts, beside the chosen ones.

    python benchmarks/experts.py [--tokens 1,2,4] [--no-time]

Counts the bytes of one layer of the shapes of Qwen3-30B-A3B (128 experts of which a token chooses
8, D 2048, I 768) as `check --why` does, for each front, from a graph whose weights take no memory;
and runs a layer of 64 experts, 4 chosen, on ONNX Runtime in both forms, in the same process.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.streamed import StreamedTensor
from omforge.lowering.legalize import Decision, legalize
from omforge.lowering.legalize.experts import DENSE, EXPERTS, GATHERED
from omforge.lowering.legalize.traffic import bytes_moved
from omforge.lowering.target import target
from omforge.passes import make_pipeline
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.passes.turn_weights import TurnWeights
from omforge.testing import parse

SOCS = ("Ascend910B4", "Ascend310P3")
QWEN3_30B_A3B = (128, 8, 2048, 768)
TIMED = (64, 4, 1024, 512)


class Zeros(StreamedTensor):
    """Weights that nobody reads."""

    def pieces(self) -> Iterator[bytes]:
        """Zeros, a matrix at a time."""
        for _ in range(self.shape.numpy()[0]):
            yield bytes(self.nbytes // self.shape.numpy()[0])


def layer(tokens: int, sizes: tuple[int, int, int, int], dtype: str) -> ir.Model:
    """A router and gated experts in the canonical form, weights of zeros."""
    experts, each, width, inner = sizes
    rows = tokens * each
    model = parse(f"""<ir_version: 11, opset_import: ["" : 24]>
    g ({dtype}[{tokens}, {width}] x, {dtype}[{width}, {experts}] router,
       {dtype}[{experts}, {width}, {inner}] gate, {dtype}[{experts}, {width}, {inner}] up,
       {dtype}[{experts}, {inner}, {width}] down) => ({dtype}[{tokens}, {width}] y)
    <int64[1] k = {{{each}}}, int64[1] flat = {{-1}}, int64[2] column = {{-1, 1}},
     int64[2] all = {{-1, {width}}}, int64[3] apart = {{{tokens}, {each}, {width}}},
     int64[1] middle = {{1}}, int64 zero = {{0}}, int64 one = {{1}}, int64 count = {{{tokens}}},
     int64 rows = {{{rows}}}, int64 each = {{{each}}}> {{
        scores = MatMul (x, router)
        shares = Softmax <axis = -1> (scores)
        best, chosen = TopK (shares, k)
        ids = Reshape (chosen, flat)
        gates = MatMul (x, gate)
        ups = MatMul (x, up)
        act = Swish (gates)
        hidden = Mul (act, ups)
        downs = MatMul (hidden, down)
        table = Reshape (downs, all)
        number = Range (zero, rows, one)
        token = Div (number, each)
        first = Mul (ids, count)
        index = Add (first, token)
        own = Gather <axis = 0> (table, index)
        share = Reshape (best, column)
        weighed = Mul (own, share)
        parts = Reshape (weighed, apart)
        y = ReduceSum <keepdims = 0> (parts, middle)
    }}""")
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = Zeros(value.dtype, value.shape.numpy(), value.name or "")
        model.graph.register_initializer(value)
    return model


def lowered(model: ir.Model, soc: str, front: str, form: str) -> tuple[ir.Model, Decision]:
    """The layer in one form."""
    infer_model(model)
    make_pipeline("fold-constants,remove-no-ops").run(model)
    infer_model(model)
    told: list[Decision] = []
    legalize(model, target(soc), front, forms={EXPERTS: form} if form else {}, told=told)  # pyright: ignore[reportArgumentType]
    return model, next(each for each in told if each.op == EXPERTS)


def count(tokens: int) -> None:
    """Print the bytes of a step of so many tokens."""
    for bits, soc in itertools.product((16, 8, 4), SOCS):
        if bits == 4 and soc == "Ascend310P3":
            continue  # which has no kernel for int4
        for front in ("onnx", "air"):
            moved: dict[str, int] = {}
            for form in (DENSE, GATHERED, ""):
                model = layer(tokens, QWEN3_30B_A3B, "float16")
                if bits < 16:
                    infer_model(model)
                    QuantizeWeights(bits, 128 if bits == 4 else 0).run(model)
                    if soc == "Ascend310P3":
                        TurnWeights().run(model)
                model, decision = lowered(model, soc, front, form)
                moved[form] = bytes_moved(model.graph).total
                chosen = decision.form
            print(
                f"{tokens} tokens, {bits} bits, {soc}, {front}: dense "
                f"{moved[DENSE] / 1e6:.1f} MB, gathered {moved[GATHERED] / 1e6:.1f} MB, "
                f"{moved[DENSE] / moved[GATHERED]:.1f}x; chosen: {chosen}"
            )


def run(form: str, tokens: int) -> float:
    """Seconds of a step on ONNX Runtime, the median of many."""
    model = layer(tokens, TIMED, "float")
    random = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, Zeros):
            shape = value.const_value.shape.numpy()
            value.const_value = ir.tensor(
                random.standard_normal(shape, np.float32) / 16, name=value.name
            )
    model, _ = lowered(model, SOCS[0], "onnx", form)
    runtime: Any = onnxruntime  # its stub is incomplete
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    taken: list[float] = []
    for _ in range(15):
        x = random.standard_normal((tokens, TIMED[2]), np.float32)
        start = time.perf_counter()
        session.run(None, {"x": x})
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", default="1,2,4", help="of a step, several behind commas")
    parser.add_argument("--no-time", action="store_true", help="count bytes alone")
    given = parser.parse_args()
    for tokens in map(int, given.tokens.split(",")):
        count(tokens)
    if not given.no_time:
        experts, each, *_ = TIMED
        dense, gathered = run(DENSE, 1), run(GATHERED, 1)
        print(
            f"ONNX Runtime, {experts} experts, {each} chosen, one token: dense {dense * 1e3:.2f} "
            f"ms, gathered {gathered * 1e3:.2f} ms: {dense / gathered:.1f}x"
        )


if __name__ == "__main__":
    main()
