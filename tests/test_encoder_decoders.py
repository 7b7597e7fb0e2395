"""Decoders that attend to an encoder's states: compiled, verified, and run with what is given."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from omforge.cli.app import app
from omforge.compilation.compile import compile_bundle
from omforge.compilation.footprint import memory_text
from omforge.compilation.options import CompileOptions
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.runtime.fixed import random_fixed

Decoders = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def whisper(decoder: Decoders, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The length of its memory is in config.json."""
    options = CompileOptions("Ascend310P3", context=32, prefill=(4,))
    folder = tmp_path_factory.mktemp("whisper") / "bundle"
    return Bundle.open(compile_bundle(decoder("optimum", "whisper"), folder, options).folder)


def test_keys_and_values_of_the_encoder_are_fixed_inputs(whisper: Bundle) -> None:
    assert [(f.name, f.shape, f.kind) for f in whisper.manifest.fixed] == [
        (f"past_key_values.{layer}.encoder.{kind}", ("batch", 2, 1500, 16), "memory")
        for layer in (0, 1)
        for kind in ("key", "value")
    ]
    assert whisper.manifest.model.layers == 2
    told = whisper.manifest.coverage["attention"]
    assert (told["found"], told["expected"]) == (4, 4)


def test_they_are_no_cache_of_the_bundle(whisper: Bundle) -> None:
    """Though their names begin as a cache's do."""
    layers, heads, slots, size, bytes_of = 2, 2, 32, 16, 2
    counted = whisper.manifest.quantization.cache_bytes
    assert counted == 2 * layers * heads * slots * size * bytes_of
    assert "+ given inputs 0.37 MiB = " in memory_text(whisper.manifest)


def test_an_int8_cache_beside_them(decoder: Decoders, tmp_path: Path) -> None:
    """The text is longer than the model has positions, and is cut."""
    np.save(tmp_path / "text.npy", np.arange(1, 201)[None])
    options = CompileOptions(
        "Ascend310P3",
        context=32,
        prefill=(4,),
        layout="per-layer",
        kv_dtype="int8",
        calibration=tmp_path / "text.npy",
    )
    source = decoder("optimum", "whisper")
    bundle = Bundle.open(compile_bundle(source, tmp_path / "b", options).folder)
    dtypes = {spec.name: spec.dtype for spec in bundle.manifest.buckets[0].inputs}
    assert dtypes["past_key_values.0.key"] == "int8"
    assert dtypes["past_key_values.0.encoder.key"] == "float16"
    report = verify_bundle(bundle, steps=2)
    assert report.ok, report.failures


def test_every_step_reads_them(whisper: Bundle) -> None:
    report = verify_bundle(whisper, steps=2)
    assert report.ok, report.failures
    assert report.reference == "exported"


def test_memory_that_is_read_in_another_order_is_found(whisper: Bundle) -> None:
    """What is given differs from layer to layer, so that verify sees who reads it."""
    manifest = whisper.manifest
    names = manifest.export.fixed
    swapped = dataclasses.replace(manifest.export, fixed=(*names[2:], *names[:2]))
    report = verify_bundle(
        dataclasses.replace(whisper, manifest=dataclasses.replace(manifest, export=swapped)),
        steps=1,
    )
    assert not report.ok


def test_a_batch_whose_rows_have_memories_of_different_lengths(
    decoder: Decoders, tmp_path: Path
) -> None:
    options = CompileOptions("Ascend910B4", context=32, prefill=(4,), batch=2, encoder_length=6)
    bundle = Bundle.open(compile_bundle(decoder("dynamo", "bart"), tmp_path / "b", options).folder)
    mask = bundle.manifest.fixed[0]
    assert (mask.name, mask.dtype, mask.shape) == ("encoder_attention_mask", "int32", ("batch", 6))
    assert random_fixed((mask,), 2, 0)["encoder_attention_mask"].tolist()[1][-1] == 0
    report = verify_bundle(bundle, steps=2)
    assert report.ok, report.failures


def test_run_asks_for_what_the_encoder_made(whisper: Bundle, tmp_path: Path) -> None:
    words = ["run", str(whisper.folder), "--prompt", "a", "--max-new-tokens", "2", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    told = json.loads(result.stdout)["error"]
    assert "needs what an encoder made: past_key_values.0.encoder.key" in told["what"]
    assert "--give" in told["next"]
    np.savez(tmp_path / "given.npz", **random_fixed(whisper.manifest.fixed, 1, 0))
    result = CliRunner().invoke(app, [*words, "--give", str(tmp_path / "given.npz")])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["tokens"]) == 2
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    result = CliRunner().invoke(app, [*words, "--give", str(tmp_path / "bad.npz")])
    assert result.exit_code == 2
    assert "cannot read" in json.loads(result.stdout)["error"]["what"]
