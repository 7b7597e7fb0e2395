"""Running atc, with a stand-in that writes what the real one writes."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from omforge.atc.children import Children
from omforge.atc.command import atc_command
from omforge.atc.find import simulated_atc
from omforge.atc.run import run_atc
from omforge.ir.errors import InputError, OmforgeError
from omforge.lowering.target import target
from tests.atc.sim.models import RELU, save

T = target("Ascend310P3")


def fake_atc(folder: Path, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "atc"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return program


def test_a_run_that_succeeds(tmp_path: Path) -> None:
    program = fake_atc(
        tmp_path / "bin",
        "echo ATC start working now, please wait for a moment.\n"
        'echo "W11001: Op [n] does not hit the high-priority operator information library"\n'
        "mkdir -p om; touch om/m.om\n"
        "echo ATC run success, welcome to the next use.",
    )
    seen: list[str] = []
    result = run_atc(
        atc_command("m.onnx", "om/m", T, {"x": (1,)}),
        tmp_path,
        tmp_path / "logs" / "m.log",
        program=program,
        on_line=seen.append,
    )
    assert result.ok
    assert result.exit_status == 0
    assert result.om == tmp_path / "om" / "m.om"
    assert list(result.codes) == ["W11001"]
    assert seen[0].startswith("ATC start")
    assert (tmp_path / "logs" / "m.log").read_text().splitlines() == seen


def test_the_om_may_name_the_host(tmp_path: Path) -> None:
    program = fake_atc(tmp_path / "bin", "touch m_linux_aarch64.om; echo ATC run success")
    result = run_atc(("atc", "--output=m"), tmp_path, tmp_path / "log", program=program)
    assert result.om == tmp_path / "m_linux_aarch64.om"


def test_an_old_om_is_not_a_result(tmp_path: Path) -> None:
    (tmp_path / "m.om").touch()
    os.utime(tmp_path / "m.om", (1, 1))
    program = fake_atc(tmp_path / "bin", "echo ATC run success")
    assert run_atc(("atc", "--output=m"), tmp_path, tmp_path / "log", program=program).om is None


@pytest.mark.parametrize(
    ("body", "codes", "status"),
    [
        (
            "echo ATC run failed, Please check the detail log >&2\n"
            'echo "E13010: No operator plugin is registered for Op: n, optype: ai.onnx::16::Foo."\n'
            'echo "E13010: No operator plugin is registered for Op: m, optype: ai.onnx::16::Foo."\n'
            'echo "EZ9999: Inner Error!"\nexit 255',
            ["E13010", "EZ9999"],
            255,
        ),
        ("exit 0", [], 0),  # no word of success
        ("echo ATC run success; exit 3", [], 3),
        ('echo "E18888: Find input index by name failed."; echo ATC run success', ["E18888"], 0),
    ],
)
def test_a_run_that_fails_is_a_result(
    tmp_path: Path, body: str, codes: list[str], status: int
) -> None:
    program = fake_atc(tmp_path / "bin", body)
    result = run_atc(("atc", "--output=m"), tmp_path, tmp_path / "log", program=program)
    assert not result.ok
    assert list(result.codes) == codes
    assert result.exit_status == status
    assert "made no .om" in result.ending()
    if codes:
        assert result.codes[codes[0]].startswith(codes[0])


def test_a_folder_that_atc_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "my models"
    folder.mkdir()
    with pytest.raises(InputError, match="my models"):
        run_atc(("atc",), folder, tmp_path / "log", program=Path("/bin/true"))


def test_no_atc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("omforge.atc.find.DEFAULT_HOMES", (str(tmp_path),))
    with pytest.raises(InputError, match="atc was not found"):
        run_atc(("atc",), tmp_path, tmp_path / "log")


def test_a_program_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot run"):
        run_atc(("atc",), tmp_path, tmp_path / "log", program=tmp_path / "nothing")


def test_the_simulation_is_run_like_atc(tmp_path: Path) -> None:
    save(RELU, tmp_path)
    command = atc_command("model.onnx", "om/m", T, {"x": (1, 4)})
    result = run_atc(command, tmp_path, tmp_path / "log", program=simulated_atc())
    assert result.ok, result.lines
    assert result.om == tmp_path / "om" / "m.om"
    save(RELU, tmp_path, 20)
    refused = run_atc(command, tmp_path, tmp_path / "log", program=simulated_atc())
    assert (refused.ok, refused.exit_status, list(refused.codes)) == (False, 255, ["E13010"])


def test_stopping_ends_the_whole_group(tmp_path: Path) -> None:
    """The program is a script that starts atc.bin: both have to go."""
    program = fake_atc(tmp_path / "bin", "sleep 60 & echo $! > child; wait")
    children = Children()
    ended = threading.Event()

    def work() -> None:
        run_atc(("atc",), tmp_path, tmp_path / "log", program=program, children=children)
        ended.set()

    threading.Thread(target=work, daemon=True).start()
    deadline = time.monotonic() + 10
    while not ((tmp_path / "child").is_file() and (tmp_path / "child").read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children.stop()
    assert ended.wait(10)
    child = int((tmp_path / "child").read_text())
    while time.monotonic() < deadline + 10 and _alive(child):
        time.sleep(0.02)
    assert not _alive(child)
    with pytest.raises(InputError, match="stopped"):
        run_atc(("atc",), tmp_path, tmp_path / "log", program=program, children=children)


@pytest.mark.parametrize("own_group", [True, False], ids=["its group", "another group"])
def test_a_child_that_holds_the_pipe_is_not_waited_for(tmp_path: Path, own_group: bool) -> None:
    """And it does not stay behind, unless it made itself a group of its own."""
    starts = "sleep 60 &" if own_group else "setsid sleep 60 &"
    program = fake_atc(
        tmp_path / "bin", f"{starts} echo $! > child; touch m.om; echo ATC run success"
    )
    began = time.monotonic()
    result = run_atc(("atc", "--output=m"), tmp_path, tmp_path / "log", program=program)
    assert time.monotonic() - began < 10
    assert result.ok
    assert result.lines == ("ATC run success",)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while own_group and _alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _alive(child) != own_group
    if not own_group:
        os.kill(child, signal.SIGKILL)


def test_all_that_it_writes_is_kept(tmp_path: Path) -> None:
    """Far more than the pipe holds, a last line without an end, and bytes that are no text."""
    program = fake_atc(
        tmp_path / "bin", "seq 100000; printf '\\377 x\\nATC run success'; touch m.om; sleep 0.3"
    )
    result = run_atc(("atc", "--output=m"), tmp_path, tmp_path / "log", program=program)
    assert result.ok
    assert result.lines[99_999:] == ("100000", "\ufffd x", "ATC run success")
    assert (tmp_path / "log").read_text().splitlines() == list(result.lines)


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    program = fake_atc(tmp_path / "bin", "sleep 60")
    (tmp_path / "log").mkdir()
    with pytest.raises(OmforgeError, match=r"cannot write .*/log: Is a directory"):
        run_atc(("atc", "--output=m"), tmp_path, tmp_path / "log", program=program)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # A process that ended is kept until its parent asks for it.
    stat = Path(f"/proc/{process}/stat")
    return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("exit 0", "did not say 'ATC run success', and made no .om; it wrote nothing"),
        ("echo ATC run success", "it said that it succeeded, and made no .om"),
        (
            "echo no memory; exit 3",
            "ended with status 3, and made no .om; its last line: no memory",
        ),
        ("kill -SEGV $$", "ended by signal 11"),
    ],
)
def test_how_a_run_ended_is_told_where_no_code_is(tmp_path: Path, body: str, told: str) -> None:
    program = fake_atc(tmp_path / "bin", body)
    result = run_atc(("atc", "--output=m"), tmp_path, tmp_path / "log", program=program)
    assert told in result.ending()
