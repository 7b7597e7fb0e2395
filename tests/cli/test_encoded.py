"""`run` of a bundle that encodes: vectors and scores for people, JSON and files for programs."""

import errno
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


def test_no_text_is_refused_with_what_to_do(bert: Bundle) -> None:
    result = CliRunner().invoke(app, ["run", str(bert.folder), "--prompt", ""])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: the text is empty",
        "  why:  there is no token to encode",
        "  next: Give it a word, or a token at least",
    ]


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


@pytest.mark.parametrize(
    "words", [["--chat"], ["--temperature", "0.5"], ["--max-new-tokens", "128"], ["--seed", "0"]]
)
def test_options_of_the_other_kind_are_refused(bert: Bundle, words: list[str]) -> None:
    """Also where they say what is the default."""
    result = CliRunner().invoke(app, ["run", str(bert.folder), "--prompt", "a", *words])
    assert result.exit_code == 2
    assert "does not generate" in result.stderr
    assert f"Leave {words[0]} away" in result.stderr


def test_a_file_is_saved_whole_or_not_at_all(
    bert: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk the one that was there stays, and nothing is left beside it."""
    file, link = tmp_path / "x.npz", tmp_path / "link.npz"
    file.write_bytes(b"before")
    link.symlink_to(file)

    def full(self: Path, data: bytes) -> int:
        self.open("wb").close()  # as write_bytes does before it fails
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        words = ["run", str(bert.folder), "--prompt", "a", "--save", str(file)]
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert file.read_bytes() == b"before"
    run(bert, "--prompt", "a", "--save", str(link))
    assert link.is_symlink()
    assert file.read_bytes() != b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"x.npz", "link.npz"}
