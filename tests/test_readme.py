"""README.md shows what the program does today."""

import re
from pathlib import Path

import typer

from omforge.cli import app as cli
from tests.readme import README, ROOT, blocks, compile_output, pass_table

TEXT = README.read_text(encoding="utf-8")
STALE = "README.md is stale: run `make readme`"


def stable(output: str) -> list[list[str]]:
    """The words of a compile's output that are the same on every machine: no seconds, no diffs."""
    found: list[list[str]] = []
    for line in output.splitlines()[3:]:  # below the command and the heading
        words = line.split()
        if words[:1] == ["atc"]:
            continue  # whether it is on the machine
        found.append(words[:5] if "->" in words[2:4] else words)
    return found


def test_the_table_of_passes_is_current() -> None:
    assert blocks(TEXT)["passes"] == pass_table(), STALE


def test_the_compile_output_is_current(tmp_path: Path) -> None:
    now = compile_output(str(tmp_path / "b"))
    assert stable(blocks(TEXT)["compile"]) == stable(now), STALE


def test_every_block_is_written() -> None:
    found = blocks(TEXT)
    assert set(found) == {"compile", "verify", "run", "om", "passes", "matrix", "rooms"}
    assert found["verify"].endswith("verified\n```\n"), STALE
    assert len(found["run"].split()) > 40


def test_every_command_is_described() -> None:
    group = typer.main.get_command(cli.app)
    names = set(getattr(group, "commands", {}))
    assert {"compile", "run", "opt", "check", "explain", "verify", "passes"} <= names
    assert {name for name in names if f"omforge {name}" not in TEXT} == set()


def test_every_file_that_it_names_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_that_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z0-9-]+)", TEXT))
    assert {"demo", "test", "lint"} <= targets
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []
