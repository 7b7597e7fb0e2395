"""Names in files: plain, and inside the folder."""

from pathlib import Path

import pytest

from omforge.ir.errors import InputError
from omforge.ir.paths import inside, name_fault, path_fault


@pytest.mark.parametrize(
    "path", ["a", "a.b", "om/weight/weight_1", "./a", "权重.bin", "a b", "..a"]
)
def test_a_plain_path(path: str) -> None:
    assert path_fault(path) == ""


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("", "is empty"),
        ("/etc/passwd", "is absolute"),
        ("//x", "is absolute"),
        ("..", "leads out of the folder"),
        ("a/../../b", "leads out of the folder"),
        ("a\\..\\b", "holds a backslash"),
        ("a//b", "has a part without a name"),
        ("a/", "has a part without a name"),
        (".", "has a part without a name"),
        ("a\nb", "holds characters that cannot be printed"),
        ("a\0b", "holds characters that cannot be printed"),
        ("\x1b[2J", "holds characters that cannot be printed"),
        ("\udcff", "holds characters that cannot be printed"),
        ("x" * 256, "is longer than a file's name may be"),
        ("x/" * 3000 + "x", "is longer than a file's name may be"),
    ],
)
def test_a_path_that_is_not_plain(path: str, fault: str) -> None:
    assert path_fault(path) == fault
    assert name_fault(path) == fault


def test_a_name_is_one_part() -> None:
    assert name_fault("decode_c32") == ""
    assert name_fault("a/b") == "has a slash"


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder, other = tmp_path / "b", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (folder / "om").symlink_to(other)
    (folder / "log").symlink_to(other / "not there")
    (folder / "real").mkdir()
    (folder / "near").symlink_to("real")
    for path in ("om", "om/x", "om/x/y", "log"):
        with pytest.raises(InputError, match="leads out of"):
            inside(folder, path)
    with pytest.raises(InputError, match="leads out of the folder"):
        inside(folder, "../other")
    assert inside(folder, "near/x") == folder / "near" / "x"
    assert inside(folder, "new/x") == folder / "new" / "x"
    link = tmp_path / "link"  # the folder itself may be one
    link.symlink_to(folder)
    assert inside(link, "real/x") == link / "real" / "x"
