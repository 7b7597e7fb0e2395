"""What omforge lowers is accepted: by its own check of the files, and by the simulated atc.

Every export by every SoC family; a sample of them in `make test`.
"""

import dataclasses
import itertools
from pathlib import Path

import pytest

from omforge.atc.sim.main import run
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.lowering.legality import check_file
from omforge.lowering.target import TARGETS, target
from tests.exports import EXPORTS, export

SOCS = {row.family.name: soc for soc, row in reversed(TARGETS.items())}
"""One SoC of each family: what is lowered depends on the family alone."""

CELLS = [(*cell, soc) for cell, soc in itertools.product(EXPORTS, SOCS.values())]
SAMPLE = CELLS[:: max(1, len(CELLS) // 12)]


def test_one_soc_of_each_family_and_a_sample_of_all() -> None:
    assert set(SOCS) == {row.family.name for row in TARGETS.values()} >= {"310p", "910b", "910_93"}
    assert {soc for _, _, soc in SAMPLE} == set(SOCS.values())


VARIANTS: dict[str, CompileOptions] = {
    "gears": CompileOptions("", context=32, prefill=(8,), gears=True),
    "fp32": CompileOptions("", context=32, prefill=(8,), dtype="fp32"),
    "batch": CompileOptions("", context=32, prefill=(8, 16), batch=4),
    "stacked": CompileOptions("", context=32, prefill=(8,), layout="stacked"),
    "per-layer": CompileOptions("", context=32, prefill=(8,), layout="per-layer"),
}


@pytest.mark.parametrize(
    ("route", "family", "soc"),
    [pytest.param(*cell, marks=() if cell in SAMPLE else pytest.mark.deep) for cell in CELLS],
)
def test_a_lowered_export_is_accepted(
    route: str, family: str, soc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The one export that has lost a feature, its sliding window: see test_families.
    partial = (route, family) == ("genai", "mistral")
    options = CompileOptions(soc, context=32, prefill=(8,), allow_partial=partial)
    assert_accepted(export(route, family, tmp_path / "export"), options, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("variant", "soc"),
    [
        pytest.param(variant, soc, marks=() if at == shift else pytest.mark.deep)
        for at, variant in enumerate(VARIANTS)
        for shift, soc in enumerate(SOCS.values())
    ],
)
def test_every_way_of_compiling_is_accepted(
    variant: str, soc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = "llama_gqa" if variant in ("gears", "fp32") else "mistral"
    source = export("optimum", family, tmp_path / "export")
    options = dataclasses.replace(VARIANTS[variant], soc=soc)
    assert_accepted(source, options, tmp_path, monkeypatch)


def assert_accepted(
    source: Path, options: CompileOptions, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = folder / "bundle"
    made = compile_bundle(source, bundle, options).manifest
    monkeypatch.chdir(bundle)
    for bucket in made.buckets:
        found = check_file(bundle / bucket.file, target(options.soc), gears=options.gears)
        assert not found.offences, [str(offence) for offence in found.offences]
        result = run(bucket.command[1:])
        assert result.exit_status == 0, result.text
        assert result.codes == ()
