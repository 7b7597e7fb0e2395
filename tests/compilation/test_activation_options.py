"""What --quantize w8a8 says, what refuses it, and how atc is asked."""

from typing import Any

import pytest

from omforge.atc.command import AtcOptions, MixedPrecision, PrecisionMode, PrecisionModeV2
from omforge.compilation.activation_options import ActivationOptions, atc_for_int8
from omforge.compilation.quantize_options import (
    QuantizeOptions,
    check_quantize,
    parse_quantize,
    weight_passes,
)
from omforge.ir.errors import InputError
from omforge.lowering.target import TARGETS, target
from omforge.passes.quantize_activations import QuantizeActivations
from omforge.passes.turn_weights import TurnWeights

A310P, A310B = target("Ascend310P3"), target("Ascend310B1")
ASKED: dict[str, Any] = {"dtype": "fp16", "calibration": True, "gears": False}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w8a8", QuantizeOptions(8, activations=ActivationOptions())),
        ("w8a8:plain", QuantizeOptions(8, activations=ActivationOptions(smooth=False))),
        (
            "w8a8:limit=0.2:keep=*down*+head",
            QuantizeOptions(8, keep=("*down*", "head"), activations=ActivationOptions(limit=0.2)),
        ),
    ],
)
def test_words(text: str, expected: QuantizeOptions) -> None:
    assert parse_quantize(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w8a8:g32", "'g32' is not known"),
        ("w8a8:limit=much", "a limit of 'much' makes no sense"),
        ("w8a8:limit=-1", "a limit of '-1' makes no sense"),
        ("w8a8:limit=nan", "a limit of 'nan' makes no sense"),
    ],
)
def test_other_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_quantize(text)


@pytest.mark.parametrize("soc", sorted(TARGETS))
def test_every_soc_multiplies_int8(soc: str) -> None:
    check_quantize(parse_quantize("w8a8"), "fp16", target(soc), **ASKED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp32"}, "kernels for products of int8 give float16"),
        ({"calibration": False}, "w8a8 needs a calibration text"),
        ({"gears": True}, "atc refuses dynamic shapes for a graph that computes on int8"),
        ({"budget": "1GiB"}, "a budget shares bits among weights that are read alone"),
    ],
)
def test_what_cannot_go_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_quantize(parse_quantize("w8a8"), "fp16", A310P, **{**ASKED, **change})


def test_310b_is_told_of_it() -> None:
    with pytest.raises(InputError, match="Use --quantize w8a8"):
        check_quantize(parse_quantize("int8"), "fp16", A310B, **ASKED)


def test_the_passes_are_those_of_the_soc() -> None:
    options = parse_quantize("w8a8:limit=0.2:keep=a")
    step, turn = weight_passes(options, A310P, ())
    assert step == QuantizeActivations(True, 0.2, "int8", keep=("a",))
    assert turn == TurnWeights(0)
    step, turn = weight_passes(options, A310B, ())
    assert step == QuantizeActivations(True, 0.2, "float", keep=("a",))


def test_atc_is_asked_to_mix_unless_the_user_says_how() -> None:
    assert atc_for_int8(AtcOptions()).precision == MixedPrecision("mixed_float16")
    for chosen in (PrecisionModeV2("fp16"), PrecisionMode("force_fp16")):
        assert atc_for_int8(AtcOptions(precision=chosen)).precision == chosen
