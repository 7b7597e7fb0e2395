"""The flags of users: those that atc has, and what does the job of those that it has not."""

import pytest

from omforge.atc.flags import INSTEAD, check_flags, flags
from omforge.atc.sim.main import run
from omforge.ir.errors import InputError


def test_flags_are_spelled_as_atc_takes_them() -> None:
    words = ["-log=info", "--jit-compile", "0", "--raw_ge_options_ignore_unsupported"]
    assert check_flags(words) == (
        "--log=info",
        "--jit_compile=0",
        "--raw_ge_options_ignore_unsupported=true",
    )


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("--precision_mode=allow_quantize", "--precision_mode_v2=origin"),
        ("--quant_type=INT8", "NPUWeightQuantBatchMatmulV2"),
        ("--enable_fusion=true", "--fusion_switch_file"),
        ("--enable_mem_reuse=true", "--disable_reuse_memory"),
        ("--enable_small_channel_eliminate=true", "--enable_small_channel=1"),
        ("--compress_kv_cache=true", "AscendAntiQuant"),
        ("--mem_limit=12288", "--mode=6"),
        ("--auto_tune_mode=RL,GA", "AOE"),
        ("--enable-fusion", "--fusion_switch_file"),
    ],
)
def test_tutorial_flags_are_answered(word: str, answer: str) -> None:
    with pytest.raises(InputError) as raised:
        check_flags([word])
    assert answer in raised.value.next_step


def test_atc_refuses_what_we_answer() -> None:
    """The table would be wrong otherwise."""
    for name in INSTEAD:
        word = f"--{name}=1"
        told = run([word, "--framework=5"]).text
        known = name in flags()
        assert ("E10001" in told) if known else (f"unknown command line flag '{name}'" in told)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nonsense=1"], "atc has no flag --nonsense"),
        (["--buffer_optimise=l2_optimize"], "Did you mean --buffer_optimize"),
        (["--external_weight=3"], "it takes 0, 1, 2"),
        (["--precision_mode_v2=fp8"], "it takes "),
        (["--output_type=FP32"], "it changes the inputs or outputs"),
        (["--out_nodes=a:0"], "it changes the inputs or outputs"),
        (["--help"], "other uses of atc"),
        (["--virtual_type=x"], "it takes 0, 1"),
        (["--log"], "has no value"),
        (["x"], "is not a flag of atc"),
        (["--model=x.onnx"], "cannot be chosen"),
        (["--dynamic_dims=1;2"], "cannot be chosen"),
        (["--precision_mode=force_fp32", "--precision_mode_v2=fp16"], "exclude each other"),
        (["--compress_weight_conf=a", "--enable_compress_weight=true"], "exclude each other"),
    ],
)
def test_flags_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_flags(words)
