"""How the command line ends: wrong usage as JSON where it is asked for, a closed pipe quietly."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from omforge.cli.app import app
from omforge.cli.command_group import PIPE_CLOSED


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["passes", "--json", "--nope"], "No such option: --nope"),
        (["compile", "x", "--json"], "Missing option '--target'."),
        (["check", "--json", "m.onnx", "--target"], "Option '--target' requires an argument."),
        (["run", "b", "--json", "--prompt", "x", "--level", "raised"], "Invalid value for"),
        (["nope", "--json"], "No such command 'nope'."),
    ],
)
def test_wrong_usage_is_json_too(words: list[str], what: str) -> None:
    done = CliRunner().invoke(app, words)
    error = json.loads(done.stdout)["error"]
    assert error["what"].startswith(what)
    assert error["exit_status"] == done.exit_code == 2
    assert "--help" in error["next"]
    assert f"Error: {what}" in done.stderr


def test_wrong_usage_is_text_otherwise() -> None:
    done = CliRunner().invoke(app, ["passes", "--nope\x1b[2J"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Error: No such option: --nope\\x1b[2J" in done.stderr


@pytest.mark.parametrize("words", [["passes"], ["passes", "--json"], ["--version"]])
def test_a_reader_that_goes_away_ends_it_quietly(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # nobody will ever read
    done = subprocess.run(
        [sys.executable, "-m", "omforge", *words],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, b"")
