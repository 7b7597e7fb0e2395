"""Models that carry recurrent states beside their cache, from the export to every backend."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omforge import ir
from omforge.atc.build import BuildOptions
from omforge.bundle.manifest import StateSpec
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir.errors import InputError
from omforge.lowering.legality import check_legal
from omforge.lowering.target import target
from omforge.runtime.backends import open_model
from omforge.runtime.bundle import Bundle
from omforge.runtime.cases import make_cases
from omforge.runtime.compare import verify_bundle
from omforge.runtime.export import ExportModel
from omforge.runtime.generate import LanguageModel
from omforge.runtime.sampling import greedy
from omforge.testing import parse
from tests.passes.recurrent import model as written
from tests.recognition.lengths.test_call_limit import limited

SOC = "Ascend310P3"
WAYS: dict[str, dict[str, Any]] = {
    "half": {},
    "stacked": {"dtype": "fp32", "layout": "stacked"},
    "gears": {"dtype": "fp32", "gears": True},
    "int8": {"kv_dtype": "int8"},
}
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]  # 13 tokens: 8 + 4 + 1
OTHER = [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9]

Compiled = Callable[..., Bundle]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """`compiled(way, **options of the model)` is a bundle, made once."""
    made: dict[object, Bundle] = {}

    def compile_once(way: str, **options: Any) -> Bundle:
        key = (way, *options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(way)
            (folder / "export").mkdir()
            ir.save(parse(written(**options)), folder / "export" / "model.onnx")
            simulated = not options and way != "half"
            build = BuildOptions(atc="sim" if simulated else "none", jobs=1, cache=None)
            np.save(folder / "text.npy", np.array([TEXT, OTHER]))
            chosen = CompileOptions(
                SOC,
                context=32,
                prefill=(4, 8),
                batch=2,
                build=build,
                calibration=folder / "text.npy" if "kv_dtype" in WAYS[way] else None,
                **WAYS[way],
            )
            result = compile_bundle(folder / "export", folder / "bundle", chosen)
            assert result.coverage.complete
            made[key] = Bundle.open(result.folder, verify_hashes=True)
        return made[key]

    return compile_once


@pytest.mark.parametrize("way", WAYS)
def test_it_compiles_is_legal_and_agrees(compiled: Compiled, way: str) -> None:
    bundle = compiled(way)
    for bucket in bundle.manifest.buckets:
        offences = check_legal(ir.load(bundle.graph(bucket)), target(SOC))
        assert [offence for offence in offences if offence.level == "error"] == []
    report = verify_bundle(bundle, steps=6)
    assert report.ok, report.failures
    if way != "int8":
        assert report.worst("canonical").max_abs < 1e-4
    assert all(found.divergence is None for found in report.comparisons if found.judged)


def test_the_manifest_names_the_states_and_coverage_lists_them(compiled: Compiled) -> None:
    manifest = compiled("half").manifest
    assert manifest.states == (
        StateSpec("past_state.0", "present_state.0", "float16", ("batch", 8, 3)),
        StateSpec("past_state.1", "present_state.1", "float16", ("batch", 4, 4)),
    )
    assert manifest.export.states == (("conv_state", "new_conv"), ("ssm_state", "new_ssm"))
    assert manifest.export.extra == ()
    assert manifest.kv.layers == 1
    assert manifest.coverage["unrecognised"] == [
        "2 x recurrent state (linear attention or alike): conv_state, ssm_state"
    ]
    for bucket in manifest.buckets:
        shapes = {spec.name: spec.shape for spec in (*bucket.inputs, *bucket.outputs)}
        assert shapes["past_state.0"] == shapes["present_state.0"] == (2, 8, 3)


@pytest.mark.parametrize("way", ["stacked", "gears"])
def test_every_backend_goes_on_from_the_same_states(compiled: Compiled, way: str) -> None:
    """Chunks, then token by token, then from the beginning again."""
    bundle = compiled(way)
    manifest = bundle.manifest
    with ExitStack() as stack:
        export = stack.enter_context(ExportModel(bundle.export, manifest.export, manifest.kv))
        models = [
            stack.enter_context(LanguageModel(bundle, "canonical")),
            stack.enter_context(open_model(bundle)),
            stack.enter_context(open_model(bundle, backend="sim")),
        ]
        for prompts in ([TEXT, OTHER], [OTHER[:5], TEXT[:5]]):
            expected = export.prefill(prompts)
            found = [model.prefill(prompts) for model in models]
            for _ in range(6):
                for logits in found:
                    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
                tokens = greedy(expected)
                expected = export.decode(tokens)
                found = [model.decode(tokens) for model in models]


def test_what_hides_padding_from_a_state_sees_none(compiled: Compiled) -> None:
    report = verify_bundle(compiled("stacked", reads_mask=True), steps=3)
    assert report.ok, report.failures


@pytest.mark.parametrize(
    ("length", "plan"),
    [(1, [1]), (3, [1, 1, 1]), (4, [4]), (13, [8, 4, 1]), (23, [8, 8, 4, 1, 1, 1])],
)
def test_no_bucket_is_padded(compiled: Compiled, length: int, plan: Sequence[int]) -> None:
    seen: list[int] = []
    with LanguageModel(compiled("half")) as model:
        original = model._session

        def session(seq: int) -> Any:
            seen.append(seq)
            return original(seq)

        model._session = session  # type: ignore[method-assign]
        model.prefill([[1] * length])
    assert seen == plan


def test_without_a_decode_bucket_the_rest_has_no_place(compiled: Compiled) -> None:
    with LanguageModel(compiled("half")) as model:
        del model._buckets["decode", 1]
        with pytest.raises(InputError, match="the last 3 tokens fit no bucket"):
            model.prefill([[1] * 7])


def test_prompts_of_different_lengths_are_refused(compiled: Compiled) -> None:
    with (
        LanguageModel(compiled("half")) as model,
        pytest.raises(InputError, match=r"the prompts have 2, 3 tokens: .*recurrent states"),
    ):
        model.prefill([[1, 2], [1, 2, 3]])


def test_a_row_that_idles_is_no_padding(compiled: Compiled) -> None:
    with LanguageModel(compiled("half")) as model:
        both, one = model.prefill([TEXT, OTHER]), model.prefill([TEXT])
    np.testing.assert_array_equal(one[0], both[0])


def test_cases_are_rows_of_one_length(compiled: Compiled) -> None:
    bundle = compiled("half")
    for case in make_cases(bundle):
        assert len(set(map(len, case.prompts))) == 1
    cases = make_cases(bundle, prompts=[[1, 2], [3], [4, 5]])
    assert [case.prompts for case in cases] == [((1, 2),) * 2, ((3,),) * 2, ((4, 5),) * 2]
    cases = make_cases(bundle, prompts=[[1, 2], [3, 4]])
    assert [case.prompts for case in cases] == [((1, 2), (3, 4))]


def test_a_bundle_whose_states_do_not_fit_its_graphs_is_refused(
    compiled: Compiled, tmp_path: Path
) -> None:
    from tests.runtime.tiny import change_manifest

    bundle = compiled("half")
    for file in bundle.folder.rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(bundle.folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())

    def grow(data: Any) -> None:
        data["states"][0]["shape"] = ["batch", 8, 4]

    change_manifest(tmp_path, grow)
    with pytest.raises(InputError, match=r"input past_state\.0 does not fit"):
        Bundle.open(tmp_path)


def test_an_export_that_loses_tokens_beyond_some_gets_no_more_at_once(tmp_path: Path) -> None:
    """As one whose loop over chunks was exported with a single chunk, of 8 tokens."""
    ir.save(parse(limited(8)), tmp_path / "model.onnx")
    options = CompileOptions(SOC, context=40, dtype="fp32", build=BuildOptions(atc="none"))
    with pytest.raises(InputError, match="a prefill bucket of 16 tokens is more than the export"):
        compile_bundle(tmp_path, tmp_path / "b", dataclasses.replace(options, prefill=(4, 16)))
    made = compile_bundle(tmp_path, tmp_path / "b", options)
    assert [bucket.seq for bucket in made.manifest.buckets] == [8, 1]
    assert made.manifest.export.longest_call == 8
    assert [e.reason.partition(":")[0] for e in made.events if e.done] == ["at most 8"]
    report = verify_bundle(Bundle.open(tmp_path / "b"))
    assert report.ok, report.failures
