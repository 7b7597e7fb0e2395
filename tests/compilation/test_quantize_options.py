"""What --quantize and its companions say, and what a SoC refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omforge.compilation.quantize_options import (
    QuantizeOptions,
    check_quantize,
    kv_passes,
    parse_quantize,
    read_calibration,
    weight_passes,
)
from omforge.ir.errors import InputError
from omforge.lowering.target import target


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8", QuantizeOptions(8)),
        ("int4", QuantizeOptions(4, 128)),
        ("int4:g32", QuantizeOptions(4, 32)),
        ("int4:g0:asym", QuantizeOptions(4, 0, symmetric=False)),
        ("int8:g64:hqq", QuantizeOptions(8, 64, symmetric=False, method="hqq")),
        ("int8:g64:sym:hqq", QuantizeOptions(8, 64, method="hqq")),
        ("int4:gptq:g64:sym", QuantizeOptions(4, 64, method="gptq")),
        (
            "int4:awq:keep=*down*+head",
            QuantizeOptions(4, 128, method="awq", keep=("*down*", "head")),
        ),
    ],
)
def test_words_in_any_order(text: str, expected: QuantizeOptions) -> None:
    options = parse_quantize(text)
    assert options == expected
    if options is not None and options.group:
        assert parse_quantize(str(options)) == options


def test_nothing_is_floats() -> None:
    assert parse_quantize("") is None
    assert weight_passes(None, target("Ascend310P3"), ()) == ()
    assert kv_passes("fp16", (), 512) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int2", "'int2' is no kind of weight: kinds are int8, int4"),
        ("int4:g48", "groups of 48 weights make no sense"),
        ("int4:best", "'best' is not known"),
        ("int4:", "'' is not known"),
    ],
)
def test_other_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_quantize(text)
    assert message in str(caught.value)
    assert "int4:g32:gptq:asym" in str(caught.value) or "usual" in str(caught.value)


GOOD: dict[str, Any] = {"dtype": "fp16", "calibration": True, "gears": False}


@pytest.mark.parametrize(
    ("text", "kv", "soc", "change", "message"),
    [
        ("int8", "fp16", "Ascend310B1", {}, "no kernel for products with quantised weights"),
        ("int4", "fp16", "Ascend310P3", {}, "int8 weights with one scale per channel, and nothing"),
        ("int8:g32", "fp16", "Ascend310P3", {}, "Use --quantize int8"),
        ("int8", "fp16", "Ascend910B4", {"dtype": "fp32"}, "takes float16 beside its weights"),
        ("int4:gptq", "fp16", "Ascend910B4", {"calibration": False}, "needs a calibration text"),
        ("", "int8", "Ascend310P3", {"calibration": False}, "--kv-dtype int8 needs a calibration"),
        ("", "int8", "Ascend310P3", {"gears": True}, "an int8 cache cannot have gears"),
    ],
)
def test_what_a_soc_cannot_do_is_refused_and_what_it_has_is_named(
    text: str, kv: Any, soc: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_quantize(parse_quantize(text), kv, target(soc), **(GOOD | change))
    assert message in str(caught.value)


def test_a_budget_needs_a_size_and_a_kind_of_weight() -> None:
    soc = target("Ascend910B4")
    with pytest.raises(InputError, match="--budget 3GB without --quantize"):
        check_quantize(None, "fp16", soc, budget="3GB", **GOOD)
    with pytest.raises(InputError, match="'3 things' is no size"):
        check_quantize(parse_quantize("int4"), "fp16", soc, budget="3 things", **GOOD)
    check_quantize(parse_quantize("int4"), "fp16", soc, budget="3GB", **GOOD)
    step, _ = weight_passes(parse_quantize("int4:g64"), soc, (), budget="3GB")
    assert str(step) == "quantize-weights{bits=4 group=64 budget=3GB}"


@pytest.mark.parametrize(
    ("text", "soc"),
    [("int8", "Ascend310P3"), ("int4:g32:gptq", "Ascend910B4"), ("int4", "Ascend910_95")],
)
def test_what_it_can_do_passes(text: str, soc: str) -> None:
    check_quantize(parse_quantize(text), "int8", target(soc), **GOOD)


def test_what_follows_int8_shares_a_scale() -> None:
    assert kv_passes("fp16", (), 512) == ()
    for kv, granularity in (
        ("int8", "channel"),
        ("int8:channel", "channel"),
        ("int8:head", "head"),
    ):
        (step,) = kv_passes(kv, (), 512)  # type: ignore[arg-type]
        assert (step.granularity, step.positions) == (granularity, 512)  # type: ignore[attr-defined]


def test_310p_wants_its_weights_turned() -> None:
    options = parse_quantize("int8")
    steps = [str(step) for step in weight_passes(options, target("Ascend310P3"), ())]
    assert steps == ["quantize-weights", "turn-weights"]
    steps = [str(step) for step in weight_passes(options, target("Ascend910B4"), ())]
    assert steps[-1] == "turn-weights{wider_than=65535}"


def test_a_text_is_read_by_the_exports_tokenizer(tmp_path: Path) -> None:
    import tokenizers

    words = {f"w{index}": index for index in range(600)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.txt").write_text(" ".join(list(words)[:300]))
    pieces = read_calibration(tmp_path / "t.txt", tmp_path)
    assert [len(piece) for piece in pieces] == [256, 44]
    np.testing.assert_array_equal(np.concatenate(pieces), np.arange(300))


def test_token_numbers_need_no_tokenizer(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(6).reshape(2, 3))
    assert [list(piece) for piece in read_calibration(tmp_path / "t.npy", tmp_path)] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    assert read_calibration(None, tmp_path) == ()


def test_a_text_without_a_tokenizer_or_without_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("some words")
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        read_calibration(tmp_path / "t.txt", tmp_path)
    with pytest.raises(InputError, match="cannot read the calibration text"):
        read_calibration(tmp_path / "other.txt", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizers cannot load"):
        read_calibration(tmp_path / "t.txt", tmp_path)
