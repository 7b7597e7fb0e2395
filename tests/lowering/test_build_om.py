"""build-om: atc is run on each bucket, and what it makes is entered in the manifest."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from omforge import ir
from omforge.lowering.build_om import build_om
from omforge.lowering.compile import CompileOptions, compile_bundle
from omforge.lowering.manifest import Manifest

Exported = Callable[[str, str], Path]

# Stands for atc: makes the file that --output names, or refuses graphs with a word in their name.
ATC = """#!/bin/sh
for argument; do
  case "$argument" in
    --output=*) output="${argument#--output=}" ;;
    --model=*%s*) echo "E13010: No operator plugin is registered"; echo "ATC run failed"; exit 255 ;;
  esac
done
mkdir -p "$(dirname "$output")"
echo om > "$output.om"
echo "ATC run success, welcome to the next use."
"""


def _atc(folder: Path, refuses: str = "NONE") -> Path:
    folder.mkdir()
    program = folder / "atc"
    program.write_text(ATC % refuses)
    program.chmod(0o755)
    return program


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Path:
    options = CompileOptions("Ascend310P3", context=32, prefill=(8,))
    return compile_bundle(exported("dynamo", "llama_mha"), tmp_path / "b", options).folder


def test_every_bucket_is_compiled_and_entered(bundle: Path, tmp_path: Path) -> None:
    manifest = build_om(bundle, _atc(tmp_path / "bin"))
    assert manifest == Manifest.load(bundle)
    assert [b.om for b in manifest.buckets] == ["om/prefill_s8_c32.om", "om/decode_c32.om"]
    assert all(b.om in manifest.files for b in manifest.buckets)
    assert "success" in (bundle / "om" / "decode_c32.log").read_text()


def test_a_refusal_keeps_the_bundle_and_what_was_made(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ir.CheckError, match="E13010") as raised:
        build_om(bundle, _atc(tmp_path / "bin", refuses="decode"))
    assert "decode_c32.log" in str(raised.value)
    assert [b.om for b in Manifest.load(bundle).buckets] == ["om/prefill_s8_c32.om", None]


def test_compile_runs_the_atc_on_the_path(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = _atc(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    options = CompileOptions("Ascend310P3", context=32, prefill=(8,))
    result = compile_bundle(exported("dynamo", "llama_mha"), tmp_path / "b", options)
    assert all(b.om for b in result.manifest.buckets)
