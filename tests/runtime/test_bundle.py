"""Opening a bundle: every number that two files state is compared."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omforge.ir.errors import CheckError, InputError
from omforge.runtime.bundle import Bundle
from tests.exports import FIXTURES, TOKENIZER
from tests.runtime.tiny import Tiny, change_manifest


@pytest.fixture
def folder(tiny_bundle: Callable[[Tiny], Bundle], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_bundle(Tiny()).folder, tmp_path / "bundle"))


def bucket_change(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["buckets"][0].update(fields)


def shape_change(kind: str, name: str, shape: list[Any]) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        specs = data["buckets"][0][kind]
        next(spec for spec in specs if spec["name"] == name)["shape"] = shape

    return change


def test_a_whole_bundle_opens(tiny_bundle: Callable[[Tiny], Bundle]):
    seen: list[tuple[str, int, int]] = []
    bundle = Bundle.open(
        tiny_bundle(Tiny()).folder, verify_hashes=True, progress=lambda *step: seen.append(step)
    )
    assert bundle.batches == (1,)
    assert bundle.bucket("prefill", 8).name == "prefill_b1_s8_c24"
    assert bundle.export.is_file()
    assert seen[-1][1] == seen[-1][2]
    assert {step[0] for step in seen} == {f"hashing {name}" for name in bundle.manifest.files}


def test_a_bucket_that_is_not_there_lists_those_that_are(
    tiny_bundle: Callable[[Tiny], Bundle],
):
    with pytest.raises(InputError) as error:
        tiny_bundle(Tiny()).bucket("prefill", 16)
    assert str(error.value) == (
        "the bundle has no prefill bucket of 16 tokens at batch 1: it has decode of 1 tokens at "
        "batch 1, prefill of 4 tokens at batch 1, prefill of 8 tokens at batch 1. "
        "Build the bundle with that bucket"
    )


def test_no_folder_and_no_manifest(tmp_path: Path):
    with pytest.raises(InputError, match="is not a folder"):
        Bundle.open(tmp_path / "gone")
    with pytest.raises(InputError, match="cannot read the manifest"):
        Bundle.open(tmp_path)


def test_missing_and_empty_files_are_all_named(folder: Path):
    (folder / "canonical.onnx").unlink()
    (folder / "weights.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"canonical.onnx is missing, weights.bin is empty"):
        Bundle.open(folder)


def test_weights_that_were_nothing_from_the_beginning_may_be_so(folder: Path):
    small = folder / "tokens.bin"
    small.write_bytes(b"")
    nothing = hashlib.sha256(b"").hexdigest()
    change_manifest(folder, lambda data: data["files"].update({"tokens.bin": nothing}))
    Bundle.open(folder)
    change_manifest(folder, lambda data: data["files"].update({"tokens.bin": "0" * 64}))
    with pytest.raises(InputError, match=r"tokens.bin is empty"):
        Bundle.open(folder)


def test_a_truncated_weight_file_is_refused(folder: Path):
    data = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(data[:-64])
    with pytest.raises(InputError, match=rf"needs bytes .* which has {len(data) - 64}"):
        Bundle.open(folder)


def test_a_changed_byte_is_found_by_the_hashes_only(folder: Path):
    data = bytearray((folder / "weights.bin").read_bytes())
    data[10] ^= 1
    (folder / "weights.bin").write_bytes(data)
    Bundle.open(folder, verify_hashes=False)
    with pytest.raises(CheckError, match=r"weights.bin is not the file that was built: its sha256"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bucket_change(capacity=32), "its capacity is 32, the cache's is 24"),
        (lambda data: data["kv"].update(capacity=48), "its capacity is 24, the cache's is 48"),
        (
            shape_change("inputs", "past_key_values", [8, 2, 24, 4]),
            r"past_key_values .* it is float32\[8, 2, 24, 4\], .* float32\[4, 2, 24, 4\]",
        ),
        (
            shape_change("inputs", "attention_mask", [1, 1, 1, 24]),
            r"it is float32\[1, 1, 1, 24\], .* float32\[1, 1, 1, 25\]",
        ),
        (
            shape_change("outputs", "logits", [1, 31]),
            r"logits .* it is float32\[1, 31\], .* float32\[1, 32\]",
        ),
        (bucket_change(batch=2), r"input_ids .* it is int32\[1, 1\], .* int32\[2, 1\]"),
        (lambda data: data["kv"].update(dtype="float16"), r"float32\[.*float16\["),
        (
            lambda data: data["buckets"][0]["outputs"].pop(1),
            "has no output present_key_values: its outputs are logits",
        ),
    ],
)
def test_a_number_that_differs_is_named(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
):
    change_manifest(folder, change)
    with pytest.raises(InputError, match=message):
        Bundle.open(folder)


def test_a_bucket_with_gears_stands_for_each_of_its_lengths(
    tiny_bundle: Callable[[Tiny], Bundle], tmp_path: Path
):
    bundle = tiny_bundle(Tiny(gears=True))
    assert bundle.bucket("decode", 1) is bundle.bucket("prefill", 8)
    with pytest.raises(InputError, match="no prefill bucket of 5 tokens"):
        bundle.bucket("prefill", 5)
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    change_manifest(folder, shape_change("inputs", "attention_mask", [1, 1, "seq", "25 + seq"]))
    with pytest.raises(InputError, match=r"attention_mask does not fit .*\[1, 1, 8, 32\]"):
        Bundle.open(folder)


def test_a_tokenizer_comes_from_the_bundle(folder: Path):
    for name in TOKENIZER:
        shutil.copyfile(FIXTURES / name, folder / name)
    tokenizer = Bundle.open(folder).tokenizer()
    tokens = tokenizer.encode("hello", add_special_tokens=False)
    assert tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "hello"


def test_a_tokenizer_that_is_not_there_or_damaged(folder: Path):
    bundle = Bundle.open(folder)
    with pytest.raises(InputError, match=r"has no tokenizer: none of tokenizer.json, .*is there"):
        bundle.tokenizer()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"transformers cannot load .*tokenizer.json"):
        bundle.tokenizer()
