"""routing: a difference behind a router's tie is told as one, and stays a failure."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from omforge import ir
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir.infer import infer_model
from omforge.ir.values import dims
from omforge.passes import make_pipeline
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import insert
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.runtime.routing import first_other_choice

Exported = Callable[[str, str], Path]


def _with_router(path: Path, folder: Path, nearness: float, kind: str = "TopK") -> Path:
    """Scale each token's embedding by one of two numbers, whose scores are `nearness` apart."""
    model = ir.load(path)
    make_pipeline("canonicalize").run(model)
    infer_model(model)
    embedding = next(n for n in model.graph if n.op_type == "Gather" and _rank(n) == 3)
    old = embedding.outputs[0]
    users = old.consumers()
    width = (dims(old) or ())[-1]
    assert isinstance(width, int)
    with Builder(model) as op:
        random = np.random.default_rng(0)
        first = random.standard_normal((width, 1)).astype(np.float32)
        other = first + nearness * random.standard_normal((width, 1)).astype(np.float32)
        scores = op.MatMul(old, np.concatenate([first, other], axis=1))
        if kind == "TopK":
            _, choice = op.TopK(scores, [1], axis=-1, _outputs=2)
        elif kind == "ArgMax":
            choice = op.ArgMax(scores, axis=-1)
        else:
            one, two = op.Split(scores, axis=-1, num_outputs=2, _outputs=2)
            above = op.Greater(op.Sub(one, two), np.float32(0))
            choice = op.Cast(above, to=int(ir.DataType.INT64))
        new = op.Mul(old, op.Gather(np.array([1, -2], np.float32), choice, axis=0))
        insert(op, users[0], by="test")
    for user in users:
        user.replace_input_with(list(user.inputs).index(old), new)
    folder.mkdir()
    ir.save(model, folder / "model.onnx")
    return folder


def _rank(node: ir.Node) -> int:
    return len(dims(node.outputs[0]) or ())


def _bundle(
    source: Path,
    folder: Path,
    dtype: Literal["fp16", "fp32"] = "fp16",
    front: Literal["onnx", "air"] = "onnx",
) -> tuple[Bundle, Path]:
    options = CompileOptions(
        "Ascend910B4",
        context=48,
        prefill=(4,),
        batch=2,
        dtype=dtype,
        allow_partial=True,
        front=front,
    )
    compile_bundle(source, folder, options)
    return Bundle.open(folder), folder


@pytest.mark.parametrize(
    ("front", "kind", "first", "verdict"),
    [
        ("onnx", "TopK", "another expert", "a tie that rounding decides"),
        ("onnx", "ArgMax", "another expert", "a tie that rounding decides"),
        ("onnx", "Greater", "the other side of 0", "a limit that rounding crosses"),
        ("air", "TopK", "another expert", "a tie that rounding decides"),
        ("air", "Greater", "the other side of 0", "a limit that rounding crosses"),
    ],
)
def test_a_tie_is_named_and_the_comparison_still_fails(
    exported: Exported,
    tmp_path: Path,
    front: Literal["onnx", "air"],
    kind: str,
    first: str,
    verdict: str,
) -> None:
    source = _with_router(exported("optimum", "llama_gqa"), tmp_path / "export", 1e-5, kind)
    bundle, _ = _bundle(source, tmp_path / "half", front=front)
    report = verify_bundle(bundle, steps=4)
    assert not report.ok
    told = [failure for failure in report.failures if first in failure.why]
    assert told
    assert all(verdict in failure.why for failure in told)
    assert all("times the tolerance" in f.why or "another token" in f.why for f in told)
    assert all("--dtype fp32" in failure.next_step for failure in told)


def test_choices_that_agree_explain_nothing(exported: Exported, tmp_path: Path) -> None:
    source = _with_router(exported("optimum", "llama_gqa"), tmp_path / "export", 1.0)
    bundle, _ = _bundle(source, tmp_path / "whole", "fp32")
    vocabulary = bundle.manifest.model.vocab_size
    leader = [np.eye(2, vocabulary, dtype=np.float32)] * 3
    assert first_other_choice(bundle, [[1, 2, 3, 4, 5], [6, 7]], leader) is None


@pytest.mark.parametrize("family", ["llama_mha"])
def test_a_model_without_a_router_has_nothing_to_tell(
    exported: Exported, tmp_path: Path, family: str
) -> None:
    bundle, _ = _bundle(exported("optimum", family), tmp_path / "b")
    vocabulary = bundle.manifest.model.vocab_size
    leader = [np.eye(2, vocabulary, dtype=np.float32)]
    assert first_other_choice(bundle, [[1, 2], [3]], leader) is None
