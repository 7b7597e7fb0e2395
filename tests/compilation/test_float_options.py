"""--dtype bf16: the SoCs that have it, and the flags of atc that keep it."""

import dataclasses

import pytest

from omforge.atc.command import AtcOptions, MixedPrecision, PrecisionModeV2
from omforge.compilation.float_options import check_dtype
from omforge.ir.errors import InputError
from omforge.lowering.target import TARGETS, target

A2 = target("Ascend910B4")


def test_the_families_that_have_it() -> None:
    without = {soc.family.name: soc for soc in TARGETS.values() if soc.family.no_bfloat16}
    assert set(without) == {"310p", "310b"}
    for soc in TARGETS.values():
        if soc.family.name not in without:
            check_dtype("bf16", soc, AtcOptions())


@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend310B4"])
def test_the_others_say_why(soc: str) -> None:
    reason = target(soc).family.no_bfloat16
    assert reason is not None
    with pytest.raises(InputError) as caught:
        check_dtype("bf16", target(soc), AtcOptions())
    assert caught.value.why == f"{reason.text} ({reason.source})"


def test_a_family_of_a_plugin_says_it_by_its_dtypes() -> None:
    family = dataclasses.replace(A2.family, dtypes=A2.dtypes - {"bfloat16"})
    with pytest.raises(InputError, match="it has no bfloat16"):
        check_dtype("bf16", dataclasses.replace(A2, family=family), AtcOptions())


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_other_dtypes_are_not_its_subject(dtype: str) -> None:
    losing = AtcOptions(precision=PrecisionModeV2("fp16"))
    check_dtype(dtype, target("Ascend310P3"), losing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        AtcOptions(extra=("--precision_mode=force_fp16",)),
        AtcOptions(extra=("-precision-mode-v2=fp16",)),
        AtcOptions(extra=("--precision_mode=allow_mix_precision_fp16",)),
        AtcOptions(precision=PrecisionModeV2("fp16")),
        AtcOptions(precision=MixedPrecision("mixed_float16")),
    ],
)
def test_a_mode_that_would_lose_it_is_refused(options: AtcOptions) -> None:
    with pytest.raises(InputError, match="precision_mode"):
        check_dtype("bf16", A2, options)


@pytest.mark.parametrize(
    "options",
    [
        AtcOptions(),
        AtcOptions(extra=("--precision_mode_v2=origin",)),
        AtcOptions(extra=("--precision_mode=must_keep_origin_dtype",)),
        AtcOptions(precision=MixedPrecision("mixed_bfloat16")),
    ],
)
def test_a_mode_that_keeps_it_is_taken(options: AtcOptions) -> None:
    check_dtype("bf16", A2, options)
