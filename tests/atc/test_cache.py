"""The cache of what atc made: by content, whole or not at all."""

from pathlib import Path

import pytest

from omforge.atc.cache import AtcCache, cache_folder, cache_key
from omforge.atc.find import Atc

ATC = Atc(("atc",), "8.1.RC1")
COMMAND = ("atc", "--model=m.onnx", "--output=om/m", "--log=error")
FILES = {"m.onnx": "a", "weights.bin": "b"}


def key(
    folder: Path,
    command: tuple[str, ...] = COMMAND,
    files: dict[str, str] = FILES,
    atc: Atc = ATC,
) -> str | None:
    return cache_key(command, files, atc, folder)


def test_the_key_is_of_the_content(tmp_path: Path) -> None:
    first = key(tmp_path)
    assert first == key(tmp_path)
    assert first == key(tmp_path, (*COMMAND[:3], "--log=debug"))  # the log changes nothing
    assert first == key(tmp_path, atc=Atc(("/elsewhere/atc",), "8.1.RC1"))
    different = {
        key(tmp_path, (*COMMAND, "--external_weight=1")),
        key(tmp_path, files={**FILES, "m.onnx": "c"}),
        key(tmp_path, files={**FILES, "weights.bin": "c"}),
        key(tmp_path, atc=Atc(("atc",), "8.2.RC1")),
    }
    assert len({first, *different}) == 5


def test_files_that_flags_name_belong_to_the_key(tmp_path: Path) -> None:
    command = (*COMMAND, "--fusion_switch_file=f.cfg")
    assert key(tmp_path, command) is None
    (tmp_path / "f.cfg").write_text("A:off")
    first = key(tmp_path, command)
    (tmp_path / "f.cfg").write_text("B:off")
    assert first is not None
    assert key(tmp_path, command) != first


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    cache, made, back = AtcCache(tmp_path / "cache"), tmp_path / "made", tmp_path / "back"
    (made / "weight").mkdir(parents=True)
    (made / "m.om").write_bytes(b"om")
    (made / "weight" / "weight_1").write_bytes(b"weights")
    stored = cache.store("k", made)
    assert sorted(stored) == ["m.om", "weight/weight_1"]
    assert cache.restore("k", back) == stored
    assert (back / "weight" / "weight_1").read_bytes() == b"weights"
    assert cache.restore("other", back) is None


def test_shared_files_are_kept_once(tmp_path: Path) -> None:
    cache = AtcCache(tmp_path / "cache")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weight_1").write_bytes(b"the same")
        cache.store(name, tmp_path / name)
    assert len([p for p in (tmp_path / "cache" / "files").rglob("*") if p.is_file()]) == 1


def test_a_damaged_file_is_no_hit(tmp_path: Path) -> None:
    cache, made = AtcCache(tmp_path / "cache"), tmp_path / "made"
    made.mkdir()
    (made / "m.om").write_bytes(b"om")
    cache.store("k", made)
    (blob,) = [p for p in (tmp_path / "cache" / "files").rglob("*") if p.is_file()]
    blob.write_bytes(b"xx")
    assert cache.restore("k", tmp_path / "back") is None
    assert not (tmp_path / "back" / "m.om").exists()
    cache.store("k", made)  # it is made again
    assert cache.restore("k", tmp_path / "back") is not None
    (tmp_path / "cache" / "entries" / "k.json").write_text("{")
    assert cache.restore("k", tmp_path / "back") is None


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XDG_CACHE_HOME": "/x", "OMFORGE_CACHE": "/own"}, Path("/own")),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/omforge/atc")),
        ({}, Path.home() / ".cache" / "omforge" / "atc"),
    ],
)
def test_where_it_is(environment: dict[str, str], folder: Path) -> None:
    assert cache_folder(environment) == folder
