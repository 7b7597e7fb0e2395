"""Where a bundle may be made."""

from pathlib import Path

import pytest

from omforge.bundle.destination import destination_of
from omforge.ir.errors import InputError


def test_what_is_no_bundle_is_not_replaced(tmp_path: Path) -> None:
    assert destination_of(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a folder that holds other files"):
        destination_of(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        destination_of(tmp_path / "file")
    # The folders above it are made with it, as README's first command needs.
    assert destination_of(tmp_path / "out" / "b") == tmp_path / "out" / "b"
    with pytest.raises(InputError, match=r"file is a file: .* would be below it"):
        destination_of(tmp_path / "file" / "out" / "b")


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert destination_of(tmp_path / "link") == tmp_path / "disk"
