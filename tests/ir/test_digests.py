"""Hashes of files, and what is remembered of them."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from omforge.ir import digests
from omforge.ir.digests import known_sha256, require_digests, sha256
from omforge.ir.errors import CheckError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMFORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED_FROM", 4)


def settled(file: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that looks as if it was written a while ago: the clock is ahead of it."""
    file.write_bytes(content)
    later = time.time() + 10
    monkeypatch.setattr(digests.time, "time", lambda: later)
    return file


def reads(file: Path) -> int:
    """Bytes that are read to know the file's hash."""
    counted: list[int] = []
    real = digests.sha256

    def counting(path: Path, report: digests.Report | None = None) -> str:
        return real(path, counted.append)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "sha256", counting)
        assert known_sha256(file) == real(file)
    return sum(counted)


def test_the_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"some bytes")
    assert sha256(tmp_path / "f") == hashlib.sha256(b"some bytes").hexdigest()


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = settled(tmp_path / "f", b"some bytes", monkeypatch)
    assert [reads(file), reads(file)] == [10, 0]
    (tmp_path / "cache" / "digests.json").write_text(
        "[" * 100_000
    )  # damaged: as if it were not there
    assert [reads(file), reads(file)] == [10, 0]


def test_a_change_is_seen_whatever_its_mtime_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settled(tmp_path / "f", b"some bytes", monkeypatch)
    reads(file)
    times = file.stat()
    time.sleep(0.02)  # more than a tick of the file system's clock
    file.write_bytes(b"same bytes")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert reads(file) == 10


def test_what_changed_just_now_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"some bytes")
    assert [reads(tmp_path / "f"), reads(tmp_path / "f")] == [10, 0]


def test_where_times_are_whole_seconds_a_new_file_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = int(time.time())
    monkeypatch.setattr(digests, "identity", lambda _: (1, 2, 10, now * 10**9, now * 10**9))
    (tmp_path / "f").write_bytes(b"some bytes")
    assert [reads(tmp_path / "f"), reads(tmp_path / "f")] == [10, 10]


def test_a_cache_that_cannot_be_written_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert reads(settled(tmp_path / "f", b"some bytes", monkeypatch)) == 10


def test_the_oldest_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_MOST", 2)
    for name in ("a", "b", "c"):
        known_sha256(settled(tmp_path / name, name.encode() * 9, monkeypatch))
    kept = json.loads((tmp_path / "cache" / "digests.json").read_text())
    assert list(kept.values()) == [sha256(tmp_path / "b"), sha256(tmp_path / "c")]


def test_the_file_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [settled(tmp_path / name, name.encode() * 9, monkeypatch) for name in ("a", "b")]
    expected = {file.name: sha256(file) for file in files}
    told: list[tuple[str, int, int]] = []
    require_digests(tmp_path, expected, progress=lambda *step: told.append(step))
    assert told[-1][1:] == (18, 18)
    with pytest.raises(CheckError, match=r"b is not the file that was built: its sha256 is"):
        require_digests(tmp_path, {**expected, "b": "0" * 64})
    # What is remembered is not believed where all is asked for.
    store = tmp_path / "cache" / "digests.json"
    store.write_text(json.dumps(dict.fromkeys(json.loads(store.read_text()), "0" * 64)))
    require_digests(tmp_path, expected, remembered=False)
    with pytest.raises(CheckError, match="its sha256 is 000"):
        require_digests(tmp_path, expected)
