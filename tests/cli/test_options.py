"""The options of atc at the command line: which program, which flags, what is kept."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omforge.cli.app import app

Exported = Callable[[str, str], Path]
SIZES = ("--target", "Ascend310P3", "--context", "32", "--prefill", "8")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMFORGE_CACHE", str(tmp_path / "cache"))


def omf(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


def test_compile_with_the_simulated_atc(exported: Exported, tmp_path: Path) -> None:
    source, bundle = exported("dynamo", "llama_mha"), tmp_path / "b"
    status, text = omf("compile", source, "-o", bundle, *SIZES, "--atc", "sim")
    assert status == 0, text
    assert "om/decode_c32.om" in text
    assert (tmp_path / "cache" / "entries").is_dir()


def test_a_bundle_is_built_later(exported: Exported, tmp_path: Path) -> None:
    source, bundle = exported("dynamo", "llama_mha"), tmp_path / "b"
    status, text = omf(
        "compile", source, "-o", bundle, *SIZES, "--atc", "none", "--atc-flag=--log=info"
    )
    assert status == 0, text
    assert not (bundle / "om").exists()
    script = (bundle / "compile.sh").read_text()
    assert "--log=info" in script
    assert "--log=error" not in script
    words = ("build", bundle, "--atc", "sim", "--atc-jobs", 2, "--no-atc-cache", "--json")
    status, text = omf(*words)
    assert status == 0, text
    assert json.loads(text)["om"] == {
        "prefill_s8_c32": "om/prefill_s8_c32.om",
        "decode_c32": "om/decode_c32.om",
    }
    assert not (tmp_path / "cache").exists()


def test_flags_behind_two_hyphens_are_for_atc(exported: Exported, tmp_path: Path) -> None:
    source, bundle = exported("dynamo", "llama_mha"), tmp_path / "b"
    words = ("compile", source, "-o", bundle, *SIZES, "--atc", "none", "--")
    status, text = omf(*words, "--log", "info", "--jit_compile=0")
    assert status == 0, text
    script = (bundle / "compile.sh").read_text()
    assert "--log=info" in script
    assert "--jit_compile=0" in script
    status, text = omf(*words, "stray")
    assert status == 2
    assert "'stray' is not a flag of atc" in text


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--quant_type=INT8", "NPUWeightQuantBatchMatmulV2"),
        ("--precision_mode=allow_quantize", "--precision_mode_v2=origin"),
        ("--compress_kv_cache=true", "AscendAntiQuant"),
        ("--nonsense=1", "no flag --nonsense"),
    ],
)
def test_tutorial_flags_are_answered_before_anything_is_done(
    flag: str, answer: str, exported: Exported, tmp_path: Path
) -> None:
    source, bundle = exported("dynamo", "llama_mha"), tmp_path / "b"
    status, text = omf("compile", source, "-o", bundle, *SIZES, f"--atc-flag={flag}")
    assert status == 2
    assert answer in " ".join(text.split())
    assert not bundle.exists()


def test_an_atc_that_is_not_there(exported: Exported, tmp_path: Path) -> None:
    source, bundle = exported("dynamo", "llama_mha"), tmp_path / "b"
    status, text = omf("compile", source, "-o", bundle, *SIZES, "--atc", tmp_path / "atc")
    assert status == 2
    assert "no program that can be run" in text
