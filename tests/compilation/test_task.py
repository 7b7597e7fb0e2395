"""What a model is for is found by what its graph has."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from omforge import ir
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.compilation.task import encode_options, find_task
from omforge.passes import make_pipeline
from omforge.recognition.lengths.bounds import Bound
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.testing import parse
from tests.passes.blocks import Block

Encoders = Callable[[str, str], Path]
NO_CACHE = Block(cache=False, rotary="half", size=8)


def raised(block: Block) -> ir.Model:
    model = parse(block.text())
    make_pipeline("raise").run(model)
    return model


def test_a_cache_says_that_it_generates() -> None:
    model = raised(Block())
    assert find_task(model) == find_task(model, "generate") == "generate"
    with pytest.raises(ir.InputError, match="its input past_key carries earlier tokens"):
        find_task(model, "encode")


@pytest.mark.parametrize("visible", ["all", "near"])
def test_attention_that_looks_ahead_says_that_it_encodes(visible: str) -> None:
    """A masked language model has logits of the vocabulary for each token, too."""
    model = raised(dataclasses.replace(NO_CACHE, visible=visible))
    assert find_task(model) == find_task(model, "encode") == "encode"
    with pytest.raises(ir.InputError, match="the model has no KV cache"):
        find_task(model, "generate")


@pytest.mark.parametrize("visible", ["causal", "window"])
def test_a_language_model_without_its_cache_is_asked_for(visible: str) -> None:
    model = raised(dataclasses.replace(NO_CACHE, visible=visible))
    with pytest.raises(ir.InputError) as error:
        find_task(model)
    assert str(error.value) == (
        "the model has no KV cache: no input is joined with new keys or values into an output, so "
        "that each new token would run the whole text again. Export it with its past (Optimum: "
        "--task text-generation-with-past); --task encode lowers it as it is, one run a text"
    )
    assert find_task(model, "encode") == "encode"


def test_hidden_states_of_a_causal_model_are_an_embedders() -> None:
    edits = (
        ("logits = MatMul (hidden, head)", "logits = Identity (hidden)"),
        ("float[batch, seq, 16] logits", "float[batch, seq, 8] logits"),
    )
    assert find_task(raised(dataclasses.replace(NO_CACHE, edits=edits))) == "encode"


OPTIONS = CompileOptions("Ascend310P3")


@pytest.mark.parametrize(
    ("prefill", "context", "positions", "lengths"),
    [
        ((), None, None, (128, 512)),
        ((), None, 130, (128, 130)),
        ((), None, 64, (64,)),
        ((16,), 64, 128, (16, 64)),
        ((32, 16), None, 128, (16, 32)),
    ],
)
def test_lengths(
    prefill: tuple[int, ...], context: int | None, positions: int | None, lengths: tuple[int, ...]
) -> None:
    given = dataclasses.replace(OPTIONS, prefill=prefill, context=context)
    made = encode_options(given, [Bound(positions, "it says so")] if positions else [])
    assert made.prefill == lengths
    assert made.context == lengths[-1]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"context": 200}, "a context of 200 tokens is too long: it says so"),
        ({"kv_dtype": "int8"}, "--kv-dtype int8 does not fit the model"),
        ({"budget": "1GiB"}, "--budget 1GiB does not fit the model"),
    ],
)
def test_options_for_caches_are_refused(changes: dict[str, object], why: str) -> None:
    options = dataclasses.replace(OPTIONS, **changes)  # type: ignore[arg-type]
    with pytest.raises(ir.InputError, match=why):
        encode_options(options, [Bound(128, "it says so")])


def test_one_graph_has_the_lengths_as_gears(encoder: Encoders, tmp_path: Path) -> None:
    options = CompileOptions("Ascend310P3", prefill=(4, 12), gears=True)
    made = compile_bundle(encoder("optimum", "bert"), tmp_path / "bundle", options).manifest
    (bucket,) = made.buckets
    assert (bucket.name, bucket.kind, bucket.gears) == ("encode_gears", "encode", (4, 12))
    report = verify_bundle(Bundle.open(tmp_path / "bundle"))
    assert report.ok, report.failures


def test_an_embedder_compiles_for_several_lengths(encoder: Encoders, tmp_path: Path) -> None:
    options = CompileOptions("Ascend910B4", prefill=(8,), context=20)
    result = compile_bundle(encoder("optimum", "qwen3_embedding"), tmp_path / "bundle", options)
    made = result.manifest
    assert (made.task, made.context, made.kv.layers) == ("encode", 20, 0)
    assert [bucket.name for bucket in made.buckets] == ["encode_s8", "encode_s20"]
    assert [spec.name for spec in made.buckets[0].inputs] == [
        "input_ids",
        "position_ids",
        "attention_mask_causal",
    ]
    assert [(spec.name, spec.shape) for spec in made.outputs] == [
        ("last_hidden_state", ("batch", "seq", 64))
    ]
    assert result.coverage.complete
