"""A folder appears whole or not at all."""

from pathlib import Path

import pytest

from omforge.ir.errors import InputError
from omforge.lowering.destination import MadeFolder, destination_of


def test_the_folder_takes_its_place_when_it_is_done(tmp_path: Path) -> None:
    place = tmp_path / "b"
    for text in ("one", "two"):
        with MadeFolder(place) as folder:
            assert folder.parent == tmp_path
            (folder / "file").write_text(text)
        assert (place / "file").read_text() == text
    assert list(tmp_path.iterdir()) == [place]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "b"
    with MadeFolder(place) as folder:
        (folder / "file").write_text("one")
    with pytest.raises(FileNotFoundError), MadeFolder(place) as folder:
        (folder / "nowhere" / "file").write_text("two")
    assert (place / "file").read_text() == "one"
    assert list(tmp_path.iterdir()) == [place]


def test_what_is_no_bundle_is_not_replaced(tmp_path: Path) -> None:
    assert destination_of(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a folder that holds other files"):
        destination_of(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        destination_of(tmp_path / "file")
    with pytest.raises(InputError, match="does not exist"):
        destination_of(tmp_path / "no" / "b")
    with pytest.raises(InputError, match="cannot write beside"), MadeFolder(tmp_path / "no" / "b"):
        pass
