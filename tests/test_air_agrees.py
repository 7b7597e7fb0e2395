"""Our law for GE graphs and the simulated atc, which share no rule, judge planted faults alike."""

from pathlib import Path

import pytest

from omforge.air.files import write_air
from omforge.air.graph import Air
from omforge.atc.sim.main import AtcSimResult, run
from tests.lowering.air_legality.illegal import ILLEGAL, Illegal
from tests.lowering.air_legality.legal import EVERYWHERE, GRAPHS, SOCS

FOUND = frozenset(
    (
        *("air-edges", "air-no-cycles", "air-indices", "air-refdata-last", "air-required-inputs"),
        *("air-weight-files", "air-weight-bytes", "air-kernel", "air-dtypes"),
        *("air-ref-const", "air-ref-data", "air-ref-order", "air-ref-output"),
        "air-ref-view",
    )
)
"""Rules that atc, or where it says nothing its simulation, holds graphs against, too."""

UNSIMULATED = ("SIM062",)
"""What an operator without a reference on the CPU ends in."""


def judged(air: Air, soc: str, folder: Path) -> AtcSimResult:
    (folder / "weights.bin").write_bytes(bytes(8192))
    write_air(air, folder / "graph.air")
    flags = ["--model=graph.air", "--output=graph", "--framework=1", "--input_format=ND"]
    return run([*flags, f"--soc_version={soc}", "--precision_mode_v2=origin"])


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_legal_compiles(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for soc in SOCS.get(name, EVERYWHERE):
        assert judged(GRAPHS[name](), soc, tmp_path).codes in ((), UNSIMULATED)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{case.rule}: {case.how}") for case in ILLEGAL if case.rule in FOUND],
)
def test_what_our_law_refuses_is_refused(
    case: Illegal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = judged(case.change(GRAPHS[case.legal]()), case.soc, tmp_path)
    assert result.exit_status == 255, case
    assert result.codes != UNSIMULATED
