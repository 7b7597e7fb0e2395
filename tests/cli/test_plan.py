"""`omforge plan`, and `compile` with a plan: what is printed, and the exit status."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_app import Result

Exports = Callable[[str, str], Path]
SOC = "Ascend310P3"
SIZES = ("--context", "64", "--prefill", "16")


@pytest.fixture(scope="module")
def source(exported: Exports) -> Path:
    return exported("optimum", "llama_gqa")


def test_a_plan_tells_memory_choices_and_times(source: Path) -> None:
    done = Result("plan", source, "--target", SOC, *SIZES)
    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[0].startswith("Ascend310P3, front onnx: weights fp16, cache fp16, context 64")
    heads = [line.split()[0] for line in lines if line]
    assert {"memory", "weights", "cache", "activations", "choice", "step"} <= set(heads)
    assert "fits in 25,769,803,776 bytes (the memory of Ascend310P3)" in done.out


def test_json_has_all_of_it(source: Path) -> None:
    found = Result("plan", source, "--target", SOC, *SIZES, "--json").json
    assert found["memory"]["total"] == sum(found["memory"]["parts"].values())
    assert [step["seq"] for step in found["steps"]] == [16, 1]
    assert found["tokens_a_second_at_most"] > 0
    assert {knob["flags"] for knob in found["knobs"]} >= {"--quantize int8", "--front air"}


def test_it_fails_where_the_memory_that_was_given_is_not_enough(source: Path) -> None:
    done = Result("plan", source, "--target", SOC, *SIZES, "--memory", "100KB", "--no-knobs")
    assert done.status == 1
    assert "does not fit in 100,000 bytes (--memory)" in done.out
    assert (
        Result("plan", source, "--target", SOC, *SIZES, "--memory", "1GiB", "--no-knobs").status
        == 0
    )


def test_compile_refuses_with_the_sum(source: Path, tmp_path: Path) -> None:
    done = Result(
        *("compile", source, "--target", SOC, *SIZES, "-o", tmp_path / "b", "--memory", "300KB")
    )
    assert done.status == 1
    assert "the bundle does not fit in 292.97 KiB (300,000 bytes)" in done.err
    assert "weights " in done.err
    assert "too many" in done.err
    assert "next: It fits with --quantize int8" in done.err
    assert not (tmp_path / "b").exists()


def test_compile_chooses_lengths(source: Path, tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text("20\n20\n60\n")
    done = Result(
        *("compile", source, "--target", SOC, "--context", "64", "-o", tmp_path / "b"),
        *("--plan", "auto", "--lengths", tmp_path / "lengths", "--atc", "none"),
    )
    assert done.status == 0
    assert "for 3 prompts" in done.out
    again = Result("plan", tmp_path / "b", "--target", SOC, "--lengths", tmp_path / "lengths")
    assert again.status == 0
    assert "3 prompts of 100 tokens" in again.out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--memory", "lots"), "'lots' is no size"),
        (("--memory", "-1GiB"), "'-1GiB' is no size"),
        (("--lengths", "no-such-file"), "cannot read the lengths no-such-file"),
        (("--quantize", "int3"), "'int3' is no kind of weight"),
        (("--context", "100000"), "a context of 100000 tokens is too long"),
        (("--prefill", "7000"), "a prefill bucket of 7000 tokens makes no sense"),
    ],
)
def test_wrong_use_is_one_sentence(source: Path, arguments: tuple[str, ...], why: str) -> None:
    done = Result("plan", source, "--target", SOC, *arguments)
    assert done.status == 2
    assert why in done.err


def test_what_is_not_there_says_so(source: Path, tmp_path: Path) -> None:
    done = Result("plan", tmp_path / "none", "--target", SOC)
    assert (done.status, "does not exist" in done.err) == (2, True)
    done = Result("plan", source, "--target", "Ascend310P33")
    assert (done.status, "Did you mean Ascend310P" in done.err) == (2, True)
    (tmp_path / "empty").write_text("")
    done = Result("plan", source, "--target", SOC, "--lengths", tmp_path / "empty")
    assert (done.status, "has no lengths" in done.err, "it is empty" in done.err) == (2, True, True)


def test_a_bundle_is_planned_for_its_own_target(source: Path, tmp_path: Path) -> None:
    made = ("compile", source, "--target", SOC, *SIZES, "-o", tmp_path / "b", "--atc", "none")
    assert Result(*made).status == 0
    done = Result("plan", tmp_path / "b", "--target", SOC)
    assert done.status == 0
    assert "context 64, batch 1, prefill 16" in done.out
    wrong = Result("plan", tmp_path / "b", "--target", "Ascend910B4")
    assert (wrong.status, "was compiled for Ascend310P3" in wrong.err) == (2, True)
    fixed = Result("plan", tmp_path / "b", "--target", SOC, "--quantize", "int8")
    assert (fixed.status, "are what they are" in fixed.err) == (2, True)
