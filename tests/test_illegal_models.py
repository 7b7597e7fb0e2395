"""Deliberately illegal models: refused by our check and by the simulated atc, for one reason."""

from pathlib import Path

import pytest

from omforge.atc.sim.main import AtcSimResult, run
from omforge.lowering.legality import ALL_RULES, check_file
from omforge.lowering.tables import table_rows
from omforge.lowering.target import target
from tests.lowering.illegal_models import ILLEGAL, IllegalModel

SIMULATED = [model for model in ILLEGAL if model.sim]
BEHIND = [model for model in ILLEGAL if not model.sim]
TWINS = [model for model in ILLEGAL if model.legal is not None or model.legal_soc]


def by_name(model: IllegalModel) -> str:
    return model.name.replace(" ", "-")


def test_there_are_enough_and_each_is_one_of_a_kind() -> None:
    assert len(SIMULATED) >= 60
    assert len({model.name for model in ILLEGAL}) == len(ILLEGAL)
    assert all(model.rule in ALL_RULES for model in ILLEGAL)
    assert all(model.sim or model.reason for model in ILLEGAL)
    # What atc says nothing of, the simulator has a code of its own for.
    assert all(bool(model.code) != bool(model.trap) for model in SIMULATED)


def test_every_rule_that_refuses_has_a_model() -> None:
    advice = {name for name, rule in ALL_RULES.items() if rule.level == "advice"}
    assert {model.rule for model in ILLEGAL} | advice == set(ALL_RULES)


def test_codes_are_of_atcs_registry_or_its_inner_errors() -> None:
    registered = {row["code"] for row in table_rows("atc_errors.tsv")}
    codes = {rule.atc_code for rule in ALL_RULES.values()} | {model.code for model in ILLEGAL}
    assert codes - {"", "E19999", "EZ9999", "E89999"} <= registered


@pytest.mark.parametrize("model", ILLEGAL, ids=by_name)
def test_our_check_refuses_it(model: IllegalModel, tmp_path: Path) -> None:
    found = check_file(model.write(tmp_path), target(model.soc), gears=model.source.gears)
    broken = [error for error in found.errors if error.code == model.rule]
    assert broken, [(error.code, error.what) for error in found.offences]
    assert {error.atc for error in broken} == {model.code}
    for error in broken:
        assert error.remedy
        assert error.source
        assert error.source in error.why


@pytest.mark.parametrize("model", TWINS, ids=by_name)
def test_the_mended_model_is_legal(model: IllegalModel, tmp_path: Path) -> None:
    source = model.legal or model.source
    soc = model.legal_soc or model.soc
    found = check_file(source.write(tmp_path), target(soc), gears=source.gears)
    assert not found.errors, [str(error) for error in found.errors]


def simulate(file: Path, soc: str, flags: tuple[str, ...] = ()) -> AtcSimResult:
    output = file.parent / "out" / "model"
    given = [f"--model={file}", f"--output={output}", f"--soc_version={soc}", "--framework=5"]
    return run([*given, f"--check_report={file.parent / 'check_result.json'}", *flags])


@pytest.mark.parametrize("model", SIMULATED, ids=by_name)
def test_the_simulated_atc_refuses_it_for_the_same_reason(
    model: IllegalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMFORGE_ATC_SIM_RELEASE", model.release)
    result = simulate(model.write(tmp_path), model.soc, model.flags)
    assert result.exit_status != 0
    assert (model.code or model.trap) in result.codes, result.text
    if model.code:
        assert model.code in result.text


@pytest.mark.parametrize("model", BEHIND, ids=by_name)
def test_what_lies_behind_the_parser_is_not_refused_by_it(
    model: IllegalModel, tmp_path: Path
) -> None:
    """The mark `sim=False` is no place to hide: the simulator does accept these."""
    result = simulate(model.write(tmp_path), model.soc, model.flags)
    assert result.exit_status == 0, result.text


@pytest.mark.parametrize("model", TWINS, ids=by_name)
def test_the_simulated_atc_takes_the_mended_model(model: IllegalModel, tmp_path: Path) -> None:
    source = model.legal or model.source
    if source.gears:
        pytest.skip("needs flags of its own, see atc_sim's tests of gears")
    result = simulate(source.write(tmp_path), model.legal_soc or model.soc)
    assert result.exit_status == 0, result.text
