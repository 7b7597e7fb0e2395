"""verify_bundle: it passes what is right, and says of each fault where and how much."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from omforge.ir.errors import InputError
from omforge.ir.numerics import Tolerance, tolerance
from omforge.runtime import cases, judging
from omforge.runtime.bundle import Bundle
from omforge.runtime.cases import Case, make_cases
from omforge.runtime.compare import verify_bundle
from omforge.runtime.generate import LanguageModel
from omforge.runtime.run_cases import run_cases
from tests.runtime.tiny import (
    Tiny,
    canonical_graph,
    change_manifest,
    digest,
    exported_text,
    parsed,
    weights,
)

Bundles = Callable[[Tiny], Bundle]
WINDOWED = Tiny(windows=(None, 5))


@pytest.fixture
def folder(tiny_bundle: Bundles, tmp_path: Path) -> Path:
    """A windowed bundle and its export, to be damaged."""
    bundle = tiny_bundle(WINDOWED)
    shutil.copyfile(bundle.export, tmp_path / bundle.export.name)
    return Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))


@pytest.mark.parametrize(
    "tiny",
    [
        WINDOWED,
        Tiny(batches=(1, 3), layout="per-layer"),
        Tiny(dtype="float16"),
        Tiny(windows=(None, 5), gears=True),
    ],
    ids=str,
)
def test_a_right_bundle_passes(tiny_bundle: Bundles, tiny: Tiny):
    seen: list[tuple[str, int, int]] = []
    report = verify_bundle(tiny_bundle(tiny), progress=lambda *step: seen.append(step))
    assert report.ok, report.failures
    assert report.reference == "exported"
    pairs = {(c.level, c.reference) for c in report.comparisons}
    assert pairs == {
        ("exported, in pieces", "exported"),
        ("canonical", "exported"),
        ("lowered", "exported"),
        ("lowered", "canonical"),
    }
    assert all(c.divergence is None for c in report.comparisons)
    assert report.worst("lowered").excess < 0.2
    assert (tiny.dtype == "float16") == (report.worst("lowered").max_abs > 1e-4)
    assert seen[-1][1] == seen[-1][2]


def test_the_cases_take_every_way_through_the_graphs(tiny_bundle: Bundles):
    cases = make_cases(tiny_bundle(Tiny(batches=(1, 3), windows=(None, 12))))
    assert {case.name: tuple(map(len, case.prompts)) for case in cases} == {
        "one token": (1,),
        "shorter than a bucket": (3,),
        "in chunks": (11,),
        "beyond the window of 12": (15,),
        "ends in the bucket of 8": (16,),
        "one token, batch 3": (1, 1, 1),
        "shorter than a bucket, batch 3": (3, 3, 3),
        "in chunks, batch 3": (11, 11, 11),
        "beyond the window of 12, batch 3": (15, 15, 15),
        "ends in the bucket of 8, batch 3": (16, 16, 16),
        "padded on the left, batch 3": (15, 11, 3),
    }
    assert make_cases(tiny_bundle(Tiny())) == make_cases(tiny_bundle(Tiny()))
    assert make_cases(tiny_bundle(Tiny()), seed=1) != make_cases(tiny_bundle(Tiny()))


def test_every_bucket_is_run_behind_a_past(tiny_bundle: Bundles):
    bundle = tiny_bundle(Tiny(prefill=(2, 4, 6), capacity=40))
    with LanguageModel(bundle) as model:
        plans = [model._plan(len(case.prompts[0])) for case in make_cases(bundle)]
    assert {size for plan in plans for size, _ in plan[1:]} == {2, 4, 6}


def test_no_prompt_holds_padding(folder: Path):
    before = make_cases(Bundle.open(folder))
    token = before[1].prompts[0][0]
    change_manifest(folder, lambda data: data["model"].update(pad_token_id=token))
    cases = make_cases(Bundle.open(folder))
    assert token not in {each for case in cases for row in case.prompts for each in row}
    assert [each.name for each in cases] == [each.name for each in before]


FILLED = Tiny(capacity=40)  # as many as the model has positions
FILLING = "to the end of the context"


def test_the_context_is_filled_to_its_last_position(tiny_bundle: Bundles):
    case = make_cases(tiny_bundle(FILLED))[-1]
    assert (case.name, case.lengths, case.parts) == (FILLING, (32,), ())
    assert (case.position(0), case.position(8)) == (31, 39)
    assert FILLING not in {case.name for case in make_cases(tiny_bundle(Tiny()))}


def test_a_large_model_goes_on_at_a_few_places(
    tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cases, "_WHOLE", 0)
    seen: set[int] = set()
    for seed in range(9):
        case = make_cases(tiny_bundle(Tiny(capacity=40, batches=(1, 2))), seed=seed)[-2]
        assert (case.name, case.lengths, case.steps) == (f"{FILLING}, batch 2", (38, 38), 2)
        starts = [part.start for part in case.parts]
        assert starts == sorted(starts)
        assert [len(part.tokens[0]) for part in case.parts] == [1, 1, 1, 1, 8]
        assert case.position(len(starts) + 2) == 39
        seen |= {*starts, *range(starts[-1], 40)}
    assert seen == set(range(16, 40))


@pytest.mark.parametrize("whole", [1 << 34, 0], ids=["whole", "in places"])
@pytest.mark.parametrize("tiny", [FILLED, Tiny(capacity=40, batches=(2,), layout="per-layer")])
def test_a_table_that_is_wrong_far_out_fails(
    tiny_bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int, tiny: Tiny
):
    """Positions from 33 on belong to others: no prompt but the one to the end comes so far."""
    monkeypatch.setattr(cases, "_WHOLE", whole)
    bundle = tiny_bundle(tiny)
    assert verify_bundle(bundle).ok
    shutil.copyfile(bundle.export, tmp_path / bundle.export.name)
    copy = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    table = weights()["positions"]
    wrong = table.copy()
    wrong[33:] = table[:7]
    data = (copy / "weights.bin").read_bytes()
    assert data.count(table.tobytes()) == 1
    (copy / "weights.bin").write_bytes(data.replace(table.tobytes(), wrong.tobytes()))
    report = verify_bundle(Bundle.open(copy, verify_hashes=False))
    assert {c.case.partition(",")[0] for c in report.comparisons if not c.ok} == {FILLING}
    assert "behind the token at position 3" in report.failures[0].why


def test_an_export_that_is_right_for_a_few_tokens_a_call_fails(folder: Path):
    """From the ninth new token of a call on, it forgets what the token is."""
    change_export(
        folder,
        "x0 = Add (e, p)",
        """places = Range (nought, s, one)
        early = Less (places, eight)
        kept = Cast <to = 1> (early)
        column_kept = Unsqueeze (kept, ahead)
        known = Mul (e, column_kept)
        x0 = Add (known, p)""",
    )
    report = verify_bundle(Bundle.open(folder), prompts=[[3, 5, 7, 9, 11, 2, 4, 6]], steps=1)
    assert report.ok, report.failures
    report = verify_bundle(Bundle.open(folder))
    failure = report.failures[0]
    assert failure.what == "the export does not agree with itself in case 'in chunks'"
    assert "where it gets them in several calls" in failure.why
    assert "--prefill" in failure.next_step
    # Given no more than it can take it is right, and so is what was made of it.
    change_manifest(folder, lambda data: data["export"].update(longest_call=8))
    report = verify_bundle(Bundle.open(folder))
    assert report.ok, report.failures


def change_export(folder: Path, old: str, new: str) -> None:
    """Write the export of a bundle again, with other nodes."""
    source = exported_text(WINDOWED.windows)
    assert old in source
    text = source.replace(old, new).replace("<int64 nought", "<int64 eight = {8}, int64 nought")
    path = Bundle.open(folder).export
    path.write_bytes(parsed(text, "float32").SerializeToString(deterministic=True))
    change_manifest(folder, lambda data: data["export"].update(sha256=digest(path)))


def test_prompts_can_be_given_and_steps_are_cut_at_the_context(tiny_bundle: Bundles):
    bundle = tiny_bundle(Tiny())
    assert make_cases(bundle, prompts=[[1, 2], [3]]) == [
        Case("batch 1, prompts 0 to 0", ((1, 2),)),
        Case("batch 1, prompts 1 to 1", ((3,),)),
    ]
    report = verify_bundle(bundle, prompts=[[1] * 20])
    assert report.steps == 4
    assert [c.lengths for c in report.comparisons] == [(20,)] * 4


def test_the_report_is_json(tiny_bundle: Bundles):
    report = verify_bundle(tiny_bundle(Tiny()), steps=1)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["ok"] is True
    assert data["comparisons"][0]["level"] == "exported, in pieces"
    assert data["tolerances"]["lowered"] == {"rtol": 1e-4, "atol": 1e-4}


def test_a_lost_window_fails_where_the_text_is_longer(folder: Path):
    """The mask's name says 5, the runtime is told otherwise: as if the window had been lost."""
    change_manifest(folder, lambda data: data["masks"][1].update(window=100))
    report = verify_bundle(Bundle.open(folder), prompts=[[1], [3, 5, 7, 9, 11, 2, 4]], steps=2)
    assert not report.ok
    assert {c.case: c.ok for c in report.comparisons if c.level == "canonical"} == {
        "batch 1, prompts 0 to 0": True,
        "batch 1, prompts 1 to 1": False,
    }
    # Lowered agrees with canonical: the fault is older than lowering.
    assert all(c.ok for c in report.comparisons if c.reference == "canonical")
    failure = report.failures[0]
    assert failure.what == ("canonical differs from exported in case 'batch 1, prompts 1 to 1'")
    assert "times the tolerance (rtol 0.0001, atol 0.0001)" in failure.why
    assert failure.next_step


def test_a_changed_weight_fails_in_the_lowered_level_only(folder: Path):
    data = np.frombuffer((folder / "weights.bin").read_bytes(), np.float32).copy()
    (folder / "weights.bin").write_bytes((data * 1.01).tobytes())
    report = verify_bundle(Bundle.open(folder, verify_hashes=False), steps=1)
    ok = {(c.level, c.reference): c.ok for c in report.comparisons}
    assert ok == {
        ("exported, in pieces", "exported"): True,
        ("canonical", "exported"): True,
        ("lowered", "exported"): False,
        ("lowered", "canonical"): False,
    }


def test_without_a_tolerance_a_difference_is_told_as_one(tiny_bundle: Bundles):
    exact = {"lowered": Tolerance(0, 0)}
    report = verify_bundle(tiny_bundle(Tiny(dtype="float16")), steps=1, tolerances=exact)
    assert "inf times the tolerance (rtol 0, atol 0)" in report.failures[0].why


@pytest.mark.parametrize("allowed", [None, {"lowered": Tolerance(0, 0)}])
def test_nan_fails_and_is_named(folder: Path, allowed: dict[str, Tolerance] | None):
    data = np.frombuffer((folder / "weights.bin").read_bytes(), np.float32).copy()
    data[:] = np.nan
    (folder / "weights.bin").write_bytes(data.tobytes())
    report = verify_bundle(Bundle.open(folder, verify_hashes=False), steps=1, tolerances=allowed)
    assert "hold NaN or infinity" in report.failures[0].why
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["ok"] is False


def test_a_tolerance_can_be_given_by_level(folder: Path):
    data = np.frombuffer((folder / "weights.bin").read_bytes(), np.float32).copy()
    (folder / "weights.bin").write_bytes((data * 1.0001).tobytes())
    bundle = Bundle.open(folder, verify_hashes=False)
    assert not verify_bundle(bundle, steps=1).ok
    loose = {"lowered": Tolerance(rtol=1e-2, atol=1e-1)}
    assert verify_bundle(bundle, steps=1, tolerances=loose).ok


def test_a_graph_finer_than_its_export_has_the_tolerance_of_the_export(folder: Path):
    change_manifest(folder, lambda data: data["export"].update(dtype="float16"))
    report = verify_bundle(Bundle.open(folder), steps=1)
    assert report.tolerances["lowered"] == report.tolerances["canonical"] == tolerance("float16")
    change_manifest(folder, lambda data: data["export"].update(dtype="float32"))
    report = verify_bundle(Bundle.open(folder), steps=1)
    assert report.tolerances["lowered"] == tolerance("float32")


def test_without_the_export_canonical_is_the_reference(folder: Path):
    export = Bundle.open(folder).export
    export.unlink()
    report = verify_bundle(Bundle.open(folder), steps=1)
    assert report.ok
    assert report.reference == "canonical"
    assert "is not there: the canonical graph was the reference" in report.notes[0]
    with pytest.raises(InputError, match=r"nothing to compare: the reference is canonical"):
        verify_bundle(Bundle.open(folder), levels=("canonical",))
    with pytest.raises(InputError, match="does not exist"):
        verify_bundle(Bundle.open(folder), source=export)


def test_another_export_is_refused(folder: Path, tmp_path: Path):
    other = tmp_path / "other.onnx"
    onnx.save(canonical_graph(Tiny()), other)
    with pytest.raises(InputError, match="is not the model that the bundle was made from") as error:
        verify_bundle(Bundle.open(folder), source=other)
    assert digest(other) in error.value.why


def test_every_model_is_fed_the_references_tokens():
    """This one would choose token 0 at every step; the reference chooses 1, then 2."""

    class Zero:
        fed: ClassVar[list[list[int]]] = []

        def prefill(self, prompts: Any) -> np.ndarray:
            return np.array([[1, 0, 0]], np.float32)

        def decode(self, tokens: np.ndarray) -> np.ndarray:
            self.fed.append(tokens.tolist())
            return self.prefill([])

        def close(self) -> None:
            pass

    chosen = [np.eye(3, dtype=np.float32)[[token]] for token in (1, 2, 0)]
    cases = [Case("c", ((5,),))]
    found = run_cases(
        "zero", cases, 2, {"c": chosen}, lambda name, batch: Zero(), lambda case, done: None
    )
    assert Zero.fed == [[1], [2]]
    assert len(found["c"]) == 3


class TestDivergence:
    ALLOWED = Tolerance(rtol=0.0, atol=0.1)

    def run(self, *steps: tuple[list[float], list[float]]) -> Any:
        mine = [np.array([a], np.float32) for a, _ in steps]
        theirs = [np.array([b], np.float32) for _, b in steps]
        return judging.compare_logits(("a", "b"), Case("c", ((1,),)), mine, theirs, self.ALLOWED)

    def test_equal_tokens(self):
        found = self.run(([1.0, 2.0], [1.0, 2.05]))
        assert (found.divergence, found.gap, found.ok) == (None, None, True)
        assert found.max_abs == pytest.approx(0.05)
        assert found.excess == pytest.approx(0.5, rel=1e-3)

    def test_a_tie_within_rounding_is_reported_and_passes(self):
        found = self.run(([1.0, 2.0], [1.0, 2.0]), ([2.09, 2.0], [2.0, 2.09]))
        assert (found.divergence, found.ok) == (1, True)
        assert found.gap == pytest.approx(0.09, rel=1e-3)

    def test_another_token_fails(self):
        found = self.run(([3.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [1.0, 2.0]))
        assert (found.divergence, found.worst_step, found.ok) == (0, 0, False)
        assert found.gap == pytest.approx(1.0)
        assert found.max_rel == pytest.approx(1.0)

    def test_a_token_that_only_a_wide_tolerance_allows_fails(self, monkeypatch: Any):
        """Each logit is within rtol of a large one, but the reference's choice is clear."""
        monkeypatch.setattr(self, "ALLOWED", Tolerance(rtol=1.0, atol=0.1), raising=True)
        found = self.run(([0.0, 0.05], [0.0, -1.0]))
        assert found.excess < 1
        assert (found.divergence, found.gap, found.ok) == (0, 1.0, False)

    def test_what_is_not_judged_needs_only_be_finite(self):
        pair = [np.array([[1.0, 5.0]], np.float32)], [np.array([[5.0, 1.0]], np.float32)]
        case = Case("c", ((1,),))
        assert not judging.compare_logits(("a", "b"), case, *pair, self.ALLOWED).ok
        found = judging.compare_logits(("a", "b"), case, *pair, self.ALLOWED, judged=False)
        assert found.ok
        assert not found.judged
        broken = [np.array([[np.nan, 5.0]], np.float32)]
        assert not judging.compare_logits(
            ("a", "b"), case, broken, pair[1], self.ALLOWED, judged=False
        ).ok

    def test_other_shapes_and_infinities_are_never_close(self):
        assert self.run(([1.0], [1.0, 2.0])).excess == float("inf")
        assert self.run(([1.0, np.inf], [1.0, np.inf])).excess == float("inf")
