"""Finding CANN: the program, its environment and its version."""

from pathlib import Path

import pytest

from omforge.atc.find import at_path, choose_atc, find_atc, read_version
from omforge.ir.errors import InputError


def fake_atc(folder: Path, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "atc"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return program


def test_atc_is_found_on_the_path_then_below_cann(tmp_path: Path) -> None:
    on_path = fake_atc(tmp_path / "path", "")
    below = fake_atc(tmp_path / "cann" / "compiler" / "bin", "")
    environment = {"PATH": str(tmp_path / "path"), "ASCEND_HOME_PATH": str(tmp_path / "cann")}
    assert find_atc(environment) == on_path
    assert find_atc({**environment, "PATH": str(tmp_path)}) == below
    assert find_atc({"PATH": "", "ASCEND_TOOLKIT_HOME": str(tmp_path / "cann")}) == below


def test_a_program_that_cannot_be_executed_is_not_atc(tmp_path: Path) -> None:
    fake_atc(tmp_path / "cann" / "bin", "").chmod(0o644)
    found = find_atc({"PATH": "", "ASCEND_HOME_PATH": str(tmp_path / "cann")})
    assert found is None or tmp_path not in found.parents


def test_the_choice(tmp_path: Path) -> None:
    program = fake_atc(tmp_path / "cann" / "bin", "")
    assert choose_atc("none") is None
    found = choose_atc("auto", {"PATH": str(program.parent)})
    assert found is not None
    assert found.words == (str(program),)
    named = choose_atc(str(program), {})
    assert named is not None
    assert (named.words, named.simulated) == ((str(program),), False)
    simulated = choose_atc("sim")
    assert simulated is not None
    assert simulated.simulated
    assert simulated.version.startswith("sim-")
    with pytest.raises(InputError, match="no program that can be run"):
        choose_atc(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("x86_64-linux/ascend_toolkit_install.info", "package_name=x\nversion=8.1.RC1\n"),
        ("ascend_toolkit_install.info", "version = 8.1.RC1\n"),
        ("version.cfg", "# version\ntoolkit_running_version=[8.1.RC1:8.1.RC1]\n"),
        ("compiler/version.info", "Version=8.1.RC1\n"),
        ("opp/version.info", "Version=8.1.RC1\nversion_dir=x\n"),
    ],
)
def test_the_version(file: str, text: str, tmp_path: Path) -> None:
    home = tmp_path / "opt" / "cann"
    program = fake_atc(home / "compiler" / "bin", "")
    assert read_version(program) == ""
    (home / file).parent.mkdir(parents=True, exist_ok=True)
    (home / file).write_text(text)
    assert read_version(program) == "8.1.RC1"
    link = tmp_path / "atc"
    link.symlink_to(program)
    assert at_path(link, {}).version == "8.1.RC1"


def test_set_env_is_sourced_where_it_was_not(tmp_path: Path) -> None:
    home = tmp_path / "opt" / "cann"
    program = fake_atc(home / "bin", "")
    (home / "set_env.sh").write_text('export ASCEND_OPP_PATH="$PREFIX/opp"\n')
    environment = {"PATH": "/usr/bin:/bin", "PREFIX": "/p"}
    sourced = at_path(program, environment).environment
    assert sourced is not None
    assert sourced["ASCEND_OPP_PATH"] == "/p/opp"
    assert at_path(program, {**environment, "ASCEND_HOME_PATH": str(home)}).environment is None
    (home / "set_env.sh").write_text("exit 1\n")
    assert at_path(program, environment).environment is None


def test_an_atc_of_unknown_version_is_known_by_its_file(tmp_path: Path) -> None:
    program = fake_atc(tmp_path / "a" / "bin", "")
    first = at_path(program, {}).identity
    program.write_text("#!/bin/sh\n# another one\n")
    assert at_path(program, {}).identity != first
