"""verify says of each .om what can be said without a device."""

import shutil
from collections.abc import Callable
from pathlib import Path

from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.runtime.om_files import check_om
from tests.runtime.tiny import Tiny, change_manifest, digest

Bundles = Callable[[Tiny], Bundle]


def test_those_that_fit_are_counted_and_not_called_run(tiny_bundle: Bundles) -> None:
    found = check_om(tiny_bundle(Tiny(om=True)))
    assert len(found.fit) == 3
    assert found.notes() == [
        "3 .om files are those of their buckets by hash, inputs and outputs; "
        "what they compute was not run here"
    ]


def test_a_bundle_without_any_says_nothing(tiny_bundle: Bundles) -> None:
    assert check_om(tiny_bundle(Tiny())).notes() == []


def test_another_buckets_om_fails_the_verification(tiny_bundle: Bundles, tmp_path: Path) -> None:
    bundle = tiny_bundle(Tiny(om=True))
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    first, second, third = (bucket.om for bucket in bundle.manifest.buckets)
    assert first is not None
    assert second is not None
    assert third is not None
    shutil.copyfile(folder / second, folder / first)
    (folder / third).rename(folder / "om" / "stray.om")

    def entered(data) -> None:
        data["files"][first] = digest(folder / first)
        del data["files"][third]
        data["buckets"][2]["om"] = None

    change_manifest(folder, entered)
    changed = Bundle.open(folder)
    report = verify_bundle(changed, prompts=[[1, 2]], steps=0)
    assert not report.ok
    (failure,) = report.failures
    assert failure.what.endswith(
        f"{first} is not the .om of bucket {bundle.manifest.buckets[0].name}"
    )
    assert any("no .om yet" in note for note in report.notes)
    assert any("om/stray.om" in note for note in report.notes)
