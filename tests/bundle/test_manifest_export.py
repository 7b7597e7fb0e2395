"""What a manifest says of the export: its fields, and what they may not say."""

import dataclasses
import re
from typing import Any

import pytest

from omforge.bundle.manifest_export import (
    CacheFlag,
    Export,
    ExportCache,
    FirstStep,
    TensorSpec,
    validate_export,
)
from omforge.bundle.manifest_json import decode
from omforge.ir.errors import InputError

HASH = "0" * 64
EXPORT = Export(
    path="/models/decoder_with_past_model.onnx", sha256=HASH, input_ids="ids",
    attention_mask="mask", position_ids=None, past=(), present=(), logits="logits", extra=(),
    dtype="float16",
    caches=(ExportCache("past", ("batch", "past", 8, 16), "rows", "rows", 1),),
    first=FirstStep(
        "decoder_model.onnx", HASH, "ids", "mask", None, "logits",
        (TensorSpec("unused", "float32", ("batch", 4)),),
    ),
    cache_flag=CacheFlag("use_cache", cached=True),
)  # fmt: skip


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_it_reads_back_as_it_was() -> None:
    validate_export(EXPORT)
    assert decode(Export, plain(dataclasses.asdict(EXPORT)), "export") == EXPORT
    without = dataclasses.replace(EXPORT, first=None, cache_flag=None)
    assert decode(Export, plain(dataclasses.asdict(without)), "export") == without


CACHE = EXPORT.caches[0]
FIRST = EXPORT.first
assert FIRST is not None
WRONG = {
    r"caches\[0\].shape has 'seq'": {"caches": (dataclasses.replace(CACHE, shape=("seq", 1)),)},
    r"caches\[0\].axis is 4": {"caches": (dataclasses.replace(CACHE, axis=4),)},
    r"first.file '../x' leads out": {"first": dataclasses.replace(FIRST, file="../x")},
    r"first.sha256 'x' is not": {"first": dataclasses.replace(FIRST, sha256="x")},
}


@pytest.mark.parametrize("why", WRONG)
def test_what_is_wrong_is_named(why: str) -> None:
    with pytest.raises(InputError) as caught:
        validate_export(dataclasses.replace(EXPORT, **WRONG[why]))
    text = f"{caught.value.what} {caught.value.why}"
    assert re.search(why, text), text
