"""A folder appears whole or not at all, whatever kills its writer, and one writes at a time."""

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from omforge.ir import folders
from omforge.ir.errors import InputError, OmforgeError
from omforge.ir.folders import MadeFolder, only_writer, recover


def make(place: Path, text: str) -> None:
    with MadeFolder(place) as folder:
        (folder / "file").write_text(text)


@pytest.fixture(params=["one step", "two renames"])
def _renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)


@pytest.mark.usefixtures("_renames")
def test_the_folder_takes_its_place_when_it_is_done(tmp_path: Path) -> None:
    place = tmp_path / "b[1]*"  # no pattern
    for text in ("one", "two", "three"):
        make(place, text)
        assert (place / "file").read_text() == text
        assert list(tmp_path.iterdir()) == [place]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "b"
    make(place, "one")
    with pytest.raises(FileNotFoundError), MadeFolder(place) as folder:
        (folder / "nowhere" / "file").write_text("two")
    assert (place / "file").read_text() == "one"
    assert list(tmp_path.iterdir()) == [place]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write beside"):
        make(tmp_path / "no" / "b", "one")


def test_a_refused_rename_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "b", "one")

    def refuse(*_: object) -> bool:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(folders, "_exchange", refuse)
    with pytest.raises(OmforgeError, match=r"cannot write .*/b: Device or resource busy"):
        make(tmp_path / "b", "two")


def test_a_long_name(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 250)
    make(place, "one")
    make(place, "two")
    assert list(tmp_path.iterdir()) == [place]


KILLED = """
import os, pathlib, signal, sys
from omforge.ir import folders
place, when = pathlib.Path(sys.argv[1]), sys.argv[2]
def die(*_, **__):
    print("now", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if when == "exchanged":
    folders.shutil.rmtree = die
if when == "between":
    folders._exchange = lambda *_: False
    moved = pathlib.Path.rename
    def rename(self, target):
        moved(self, target)
        die()
    pathlib.Path.rename = rename
with folders.MadeFolder(place) as made:
    (made / "file").write_text("new")
    if when == "writing":
        die()
"""


def killed(place: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(place), when], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == b"now\n"


@pytest.mark.parametrize(("when", "text"), [("writing", "old"), ("exchanged", "new")])
def test_a_kill_leaves_one_whole_folder_and_the_next_run_cleans(
    tmp_path: Path, when: str, text: str
) -> None:
    place = tmp_path / "b"
    make(place, "old")
    killed(place, when)
    assert (place / "file").read_text() == text
    assert len(list(tmp_path.iterdir())) == 3  # the place, what was made or replaced, the lock
    mine = tmp_path / ".b-mine"  # not ours: it stays
    mine.mkdir()
    make(place, "newer")
    assert sorted(tmp_path.iterdir()) == [mine, place]
    assert (place / "file").read_text() == "newer"


def test_a_kill_between_two_renames_is_recovered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "b"
    make(place, "old")
    killed(place, "between")
    assert not place.exists()
    with caplog.at_level(logging.WARNING):
        recover(place)
    assert (place / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [place]
    assert "recovered" in caplog.text
    recover(place)


@contextmanager
def another_process_holds(place: Path) -> Generator[None]:
    """The lock, on an open file of its own as another process has it."""
    with (place.parent / f".{place.name}.omforge-lock").open("w") as file:
        file.write("12345")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_second_writer_waits_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "b"
    make(place, "one")
    alive = tmp_path / ".b.omforge-0badcafe"  # a live process': it must stay while that lives
    alive.mkdir()
    with caplog.at_level(logging.WARNING), another_process_holds(place):
        second = threading.Thread(target=make, args=(place, "two"))
        second.start()
        deadline = time.monotonic() + 10
        while "waiting for process 12345" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        place.rename(tmp_path / "elsewhere")
        recover(place)  # neither puts right what is in use
        assert alive.is_dir()
        assert not place.exists()
        (tmp_path / "elsewhere").rename(place)
        assert (place / "file").read_text() == "one"
    second.join(10)
    assert (place / "file").read_text() == "two"
    assert list(tmp_path.iterdir()) == [place]


def test_the_lock_is_taken_again_when_its_file_was_removed(tmp_path: Path) -> None:
    """Each waiting process gets it, and none of them together."""
    inside: list[int] = []
    most: list[int] = []

    def write() -> None:
        with only_writer(tmp_path / "b"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most == [1] * 6
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_nobody_can_write_beside_is_locked_itself(tmp_path: Path) -> None:
    place = tmp_path / "b"
    place.mkdir()
    tmp_path.chmod(0o555)
    try:
        with only_writer(place):
            assert not list(tmp_path.glob(".*"))
    finally:
        tmp_path.chmod(0o755)


def test_the_exchange_is_one_step_here(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not folders._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    with pytest.raises(OSError, match="No such file"):
        folders._exchange(tmp_path / "a", tmp_path / "gone")
