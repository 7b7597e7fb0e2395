"""One pass, one file, one class, one name, one test: a reader who knows one knows all."""

import inspect
from pathlib import Path

import pytest

from omforge.passes import PASSES, PIPELINES, make_pipeline
from omforge.rewriting.base import Pass, options
from omforge.rewriting.pipeline_text import parse_pipeline

TESTS = Path(__file__).parent


@pytest.mark.parametrize("name", PASSES)
def test_file_class_name_and_test_agree(name: str) -> None:
    step = PASSES[name]
    module = step.__module__.rpartition(".")[2]
    assert module == name.replace("-", "_")
    assert step.__name__ == "".join(word.capitalize() for word in name.split("-"))
    assert (TESTS / f"test_{module}.py").is_file()


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_says_in_one_line_what_it_does(name: str) -> None:
    summary = PASSES[name].summary()
    assert summary.endswith(".")
    assert 15 < len(summary) <= 100


@pytest.mark.parametrize("name", PASSES)
def test_options_have_defaults_that_text_can_give(name: str) -> None:
    step = PASSES[name]
    if not any(option.required for option in options(step).values()):
        assert make_pipeline(name).passes == (step(),)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_parse_and_print_back(name: str) -> None:
    parsed = make_pipeline(name)
    assert parsed.passes
    assert make_pipeline(str(parsed)) == parsed


def test_names_are_passes_or_pipelines_not_both() -> None:
    assert not set(PASSES) & set(PIPELINES)


def test_registered_passes_are_passes() -> None:
    assert all(inspect.isclass(step) and issubclass(step, Pass) for step in PASSES.values())
    assert parse_pipeline("", PASSES).passes == ()
