"""Legal GE graphs give nothing; each illegal one breaks exactly its rule."""

from pathlib import Path

import pytest

from omforge.air.files import write_air
from omforge.api.checking import check
from omforge.ir.errors import InputError
from omforge.lowering.air_legality import AIR_RULE_IDS, check_air_file
from omforge.lowering.target import target
from tests.lowering.air_legality.illegal import ILLEGAL, Illegal
from tests.lowering.air_legality.legal import EVERYWHERE, GRAPHS, SOCS

SAMPLES = sorted((Path(__file__).parents[2] / "air" / "samples").glob("*.air"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the weights that the graphs name."""
    path = tmp_path_factory.mktemp("air")
    (path / "weights.bin").write_bytes(bytes(8192))
    return path


@pytest.mark.parametrize("case", ILLEGAL, ids=lambda case: f"{case.rule}: {case.how}")
def test_an_illegal_graph_breaks_exactly_its_rule(case: Illegal, folder):
    found = case.offences(folder)
    assert {offence.code for offence in found} == {case.rule}, "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("name", "soc"), [(name, soc) for name in GRAPHS for soc in SOCS.get(name, EVERYWHERE)]
)
def test_a_legal_graph_breaks_none(name, soc, folder):
    case = Illegal("", "", name, lambda air: air, soc)
    assert [str(offence) for offence in case.offences(folder)] == []


def test_every_rule_has_an_illegal_graph():
    by_size = {"air-file-size"}
    assert set(AIR_RULE_IDS) - {case.rule for case in ILLEGAL} == by_size


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B4"])
def test_samples_that_ge_loaded_are_legal(sample, soc):
    assert check_air_file(sample, target(soc)).offences == ()


def test_check_takes_an_air_file_by_name_or_by_content(folder):
    sample = SAMPLES[0]
    nameless = folder / "decode"
    nameless.write_bytes(sample.read_bytes())
    for path in (sample, nameless):
        checked = check(path, "Ascend310B4")
        assert not checked.legal
        assert {offence.code for offence in checked.errors} == {"air-kernel"}
        assert checked.to_json()["nodes"] == 10
    assert check(sample, "Ascend310P3").legal


def test_an_inferred_rule_may_be_allowed(folder):
    path = folder / "graph.air"
    write_air(GRAPHS["decode"](), path)
    assert not check(path, "Ascend910_95").legal
    assert check(path, "Ascend910_95", allow=["air-kernel-inferred"]).legal
    with pytest.raises(InputError, match="not inferred"):
        check(path, "Ascend910_95", allow=["air-kernel"])
