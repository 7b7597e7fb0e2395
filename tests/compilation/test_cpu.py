"""--target cpu: one graph of any length for ONNX Runtime, its weights stored once, verified."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import omforge
from omforge import ir
from omforge.cli.app import app
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir.errors import CheckError, InputError
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import insert
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.runtime.cpu_session import CpuBackend, runs_in_place
from omforge.runtime.generate import LanguageModel

Exported = Callable[[str, str], Path]

CPU = CompileOptions("cpu", context=48, batch=2, dtype="fp32")


@pytest.mark.parametrize(
    ("route", "family", "quantize"),
    [
        ("optimum", "llama_gqa", ""),
        ("dynamo", "mistral", "int4:g32"),
        ("hfexporter", "gemma2", "int8"),
        ("hfexporter", "gpt2", "int4:g32:asym"),
    ],
)
def test_a_bundle_is_verified_and_runs_in_place(
    exported: Exported, tmp_path: Path, route: str, family: str, quantize: str
) -> None:
    source = exported(route, family)
    result = compile_bundle(source, tmp_path / "b", dataclasses.replace(CPU, quantize=quantize))
    made = result.manifest
    assert (made.target, made.front, made.kv.in_place) == ("cpu", "ort", True)
    (bucket,) = made.buckets
    assert (bucket.kind, bucket.name, bucket.command) == ("open", "open_c48_b2", ())
    assert not (tmp_path / "b" / "compile.sh").exists()
    bundle = Bundle.open(tmp_path / "b", verify_hashes=True)
    report = verify_bundle(bundle, source, steps=4)
    assert report.failures == (), report.failures
    assert runs_in_place(bundle)
    texts = [list(range(3, 20)), [5, 6, 7]]
    with (
        LanguageModel(bundle, batch=2) as fed,
        LanguageModel(bundle, batch=2, backend=CpuBackend(bundle, 2)) as bound,
    ):
        for model in (fed, bound):
            model.prefill(texts)
        # Behind a past, several tokens are a run for each row.
        more = [model.extend([[9, 8, 7], [4, 3, 2]]) for model in (fed, bound)]
        np.testing.assert_array_equal(*more)
        np.testing.assert_array_equal(*(model.decode([1, 2]) for model in (fed, bound)))


def test_attention_that_was_not_raised_keeps_its_cache_outside(
    exported: Exported, tmp_path: Path
) -> None:
    """Then the runtime copies it at every step, and nothing is bound."""
    model = ir.load(exported("optimum", "llama_gqa"))
    old = next(node for node in model.graph if node.op_type == "Softmax").outputs[0]
    users = list(old.uses())
    with Builder(model) as op:
        # Heads that are weighed behind their softmax: `Attention` has no place for it.
        new = op.Mul(old, np.linspace(0.5, 1.5, 4, dtype=np.float32).reshape(4, 1, 1))
        insert(op, users[0].node, by="test")
    for use in users:
        use.node.replace_input_with(use.idx, new)
    (tmp_path / "export").mkdir()
    ir.save(model, tmp_path / "export" / "model.onnx")
    options = dataclasses.replace(CPU, allow_partial=True)
    result = compile_bundle(tmp_path / "export", tmp_path / "b", options)
    assert not result.manifest.kv.in_place
    assert any("it is not written in place" in event.reason for event in result.events)
    bundle = Bundle.open(tmp_path / "b")
    assert not runs_in_place(bundle)
    report = verify_bundle(bundle, steps=4)
    assert report.ok, report.failures


def test_integers_are_stored_once(exported: Exported, tmp_path: Path) -> None:
    """The canonical graph dequantises the same bytes that the CPU's products read."""
    omforge.compile(
        exported("optimum", "llama_gqa"), target="cpu", output=tmp_path / "b", quantize="int4:g32"
    )
    graphs = [ir.load(tmp_path / "b" / name) for name in ("canonical.onnx", "open_c256.onnx")]
    places: list[set[tuple[int, int]]] = []
    for graph, kind in zip(graphs, ("DequantizeLinear", "MatMulNBits"), strict=True):
        slot = 0 if kind == "DequantizeLinear" else 1
        held: list[Any] = [n.inputs[slot].const_value for n in graph.graph if n.op_type == kind]  # type: ignore[union-attr]
        places.append({(tensor.offset, tensor.length) for tensor in held})
    assert places[0] == places[1]
    assert len(places[0]) == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"front": "air"}, "--front air for --target cpu"),
        ({"gears": True}, "takes any length"),
        ({"prefill": (8,)}, "takes any length"),
        ({"dtype": "fp16"}, "computes in float32"),
        ({"quantize": "w8a8"}, "its products read floats"),
        ({"kv_dtype": "int8"}, "its cache holds floats"),
        ({"layout": "stacked"}, "in place"),
        ({"forms": (("Swish", "decomposed"),)}, "NPU operators"),
        ({"soc": "Ascend310P3", "front": "ort", "dtype": "fp16"}, "are for the CPU"),
    ],
)
def test_what_is_for_npus_alone_is_refused(
    exported: Exported, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compile_bundle(
            exported("optimum", "llama_gqa"),
            tmp_path / "b",
            dataclasses.replace(CPU, **options),
        )
    assert not (tmp_path / "b").exists()


def test_a_model_without_a_cache_is_refused(
    encoder: Callable[[str, str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="a model without a cache for --target cpu"):
        compile_bundle(encoder("optimum", "bert"), tmp_path / "b", CPU)


def test_atc_has_no_part_in_it(exported: Exported, tmp_path: Path) -> None:
    from omforge.atc.build import BuildOptions, build_bundle

    omforge.compile(exported("optimum", "llama_gqa"), target="cpu", output=tmp_path / "b")
    with pytest.raises((InputError, CheckError), match="for the CPU"):
        build_bundle(tmp_path / "b", BuildOptions(atc="sim", cache=None))


@pytest.mark.parametrize(
    "words",
    [
        ("check", "MODEL", "--target", "cpu"),
        ("check", "MODEL", "--target", "cpu", "--why"),
        ("plan", "MODEL", "--target", "cpu"),
        ("probe", "--target", "cpu"),
    ],
)
def test_commands_of_npus_refuse_it(exported: Exported, words: tuple[str, ...]) -> None:
    source = str(exported("optimum", "llama_gqa"))
    result = CliRunner().invoke(app, [source if word == "MODEL" else word for word in words])
    assert result.exit_code == 2
    assert "for --target cpu" in result.output
    assert "Name an Ascend SoC" in result.output
