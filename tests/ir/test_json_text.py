"""JSON of others: what is wrong with it is a ValueError, whatever it is."""

from pathlib import Path

import pytest

from omforge import ir
from omforge.bundle.manifest import Manifest
from omforge.ir.json_text import parse_json
from omforge.recognition.config import read_config

BOMB = "[" * 200_000


def test_json_is_parsed() -> None:
    assert parse_json('{"a": [1, NaN]}', constant=str) == {"a": [1, "NaN"]}
    assert parse_json(b"[1]") == [1]


@pytest.mark.parametrize("text", [BOMB, '{"a":' * 200_000, "", "{", b"\xff", b"\xff\xfe{"])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        parse_json(text)


def test_a_nesting_bomb_is_named_by_its_file(tmp_path: Path) -> None:
    for name in ("config.json", "manifest.json"):
        (tmp_path / name).write_text(BOMB)
    with pytest.raises(ir.InputError, match=r"config\.json: its brackets are nested too deep"):
        read_config(tmp_path)
    with pytest.raises(ir.InputError, match=r"manifest\.json is not JSON: its brackets are nested"):
        Manifest.load(tmp_path)
