"""report.json: the same input gives the same bytes, and a refused write names the file."""

import json
from pathlib import Path

import pytest

from omforge.compilation.report import write_report
from omforge.ir.errors import OmforgeError
from omforge.recognition.coverage import Coverage


def test_what_is_kept(tmp_path: Path) -> None:
    write_report(tmp_path / "r.json", [], {"exported": 3}, Coverage(), [], [], {"weights": ""})
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["nodes"] == {"exported": 3}
    assert list(told) == sorted(told)


def test_a_refused_write_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OmforgeError, match=r"cannot write .*r\.json: No such file"):
        write_report(tmp_path / "no" / "r.json", [], {}, Coverage(), [], [], {})
