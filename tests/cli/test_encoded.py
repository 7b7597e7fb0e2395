"""`run` of a bundle that encodes: vectors and scores for people, JSON and files for programs."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from omforge.cli.app import app
from omforge.cli.encoded import EncodedText
from omforge.runtime.bundle import Bundle
from omforge.runtime.encode import Encoder


def run(bundle: Bundle, *words: str) -> str:
    result = CliRunner().invoke(app, ["run", str(bundle.folder), *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_text_gives_its_hidden_states(bert: Bundle, tmp_path: Path) -> None:
    first, last = run(bert, "--prompt", "hello").splitlines()
    assert first.startswith("last_hidden_state  float32[5, 64]  norm ")
    assert last.startswith("[lowered: 5 tokens in ")
    told = json.loads(run(bert, "--prompt", "hello", "--json", "--save", str(tmp_path / "x.npz")))
    assert (told["prompt"], told["level"], len(told["tokens"])) == ("hello", "lowered", 5)
    with Encoder(bert) as encoder:
        (expected,) = encoder.encode([told["tokens"]])
    values = told["outputs"]["last_hidden_state"]["values"]
    np.testing.assert_allclose(values, expected["last_hidden_state"], rtol=1e-6)
    with np.load(tmp_path / "x.npz") as kept:
        assert np.array_equal(kept["last_hidden_state"], expected["last_hidden_state"])


def test_a_pair_is_one_text(bert: Bundle) -> None:
    one, two = (
        json.loads(run(bert, "--prompt", "hel", "--json", *more))["tokens"]
        for more in ((), ("--pair", "lo"))
    )
    assert two[: len(one)] == one
    assert len(two) > len(one)


@pytest.mark.parametrize(
    ("logits", "labels", "scores"),
    [
        ([0.0, 0.0], (), {"LABEL_0": 0.5, "LABEL_1": 0.5}),
        ([0.0, np.log(3)], ("bad", "good"), {"bad": 0.25, "good": 0.75}),
        ([0.0], ("LABEL_0",), {"score": 0.5}),
    ],
)
def test_scores(logits: list[float], labels: tuple[str, ...], scores: dict[str, float]) -> None:
    outputs = {"logits": np.array(logits, np.float32)}
    told = EncodedText("a", "", (1,), "lowered", 0.0, outputs, labels)
    assert told.scores() == pytest.approx(scores)
    assert "scores  " in told.lines()[1]


def test_options_of_the_other_kind_are_refused(bert: Bundle) -> None:
    result = CliRunner().invoke(app, ["run", str(bert.folder), "--prompt", "a", "--chat"])
    assert result.exit_code == 2
    assert "does not generate" in result.stderr
    assert "Leave --chat away" in result.stderr
