"""build-om: atc is run on each bucket, and what it makes is entered in the manifest."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from omforge import ir
from omforge.air.ge_types import byte_size
from omforge.atc.build import BuildOptions, build_bundle, build_om
from omforge.atc.cache import AtcCache
from omforge.atc.find import simulated_atc
from omforge.bundle.manifest import Manifest, TensorSpec, sealed
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir.digests import sha256
from omforge.om import GEAR_INPUT, OmTensor, read_om, write_om

Exported = Callable[[str, str], Path]

# Stands for atc: makes the file that --output names and a weight beside it, or refuses graphs with a
# word in their name. It counts its runs. The .om is one that `_prepared` wrote for the bucket.
ATC = """#!/bin/sh
echo run >> "{runs}"
for argument; do
  case "$argument" in
    --output=*) output="${{argument#--output=}}" ;;
    --model=*{refuses}*)
      echo "ATC run failed, Please check the detail log"
      echo "E13010: No operator plugin is registered for Op: nothing, optype: ai.onnx::16::Foo."
      exit 255 ;;
  esac
done
mkdir -p "$(dirname "$output")/weight"
cp "{prepared}/$(basename "$output").om" "$output.om"
echo shared > "$(dirname "$output")/weight/weight_1"
echo "ATC run success, welcome to the next use."
"""

SMALL = CompileOptions("Ascend310P3", context=32, prefill=(8,))


def _atc(folder: Path, refuses: str = "NONE") -> Path:
    folder.mkdir(exist_ok=True)
    program = folder / "atc"
    prepared = folder.parent / "prepared"
    program.write_text(ATC.format(refuses=refuses, runs=folder / "runs", prepared=prepared))
    program.chmod(0o755)
    return program


def _runs(program: Path) -> int:
    runs = program.parent / "runs"
    return len(runs.read_text().splitlines()) if runs.is_file() else 0


def _prepared(bundle: Path, folder: Path) -> None:
    """An .om for each bucket, which atc would make."""
    folder.mkdir(parents=True, exist_ok=True)

    def tensors(specs: Sequence[TensorSpec], node: str = "") -> list[OmTensor]:
        return [
            OmTensor(
                node + spec.name,
                spec.dtype,
                shape := tuple(map(int, spec.shape)),
                byte_size(spec.dtype, shape),
            )
            for spec in specs
        ]

    for bucket in Manifest.load(bundle).buckets:
        write_om(
            folder / f"{bucket.name}.om",
            name=bucket.name,
            inputs=tensors(bucket.inputs),
            outputs=tensors(bucket.outputs, "node:0:"),
            partitions={2: bucket.name.encode()},
        )


@pytest.fixture(scope="module")
def whole(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was not built; read-only, with the .om files of its buckets beside it."""
    folder = tmp_path_factory.mktemp("whole")
    made = compile_bundle(exported("dynamo", "llama_mha"), folder / "b", SMALL).folder
    _prepared(made, folder / "prepared")
    return made


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole.parent / "prepared", tmp_path / "prepared")
    return Path(shutil.copytree(whole, tmp_path / "b"))


def test_every_bucket_is_compiled_and_entered(bundle: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    manifest = build_om(bundle, _atc(tmp_path / "bin"), lambda *step: told.append(step))
    assert manifest == Manifest.load(bundle)
    assert [b.om for b in manifest.buckets] == ["om/prefill_s8_c32.om", "om/decode_c32.om"]
    assert all(b.om in manifest.files for b in manifest.buckets)
    assert "om/weight/weight_1" in manifest.files
    assert read_om(bundle / "om" / "decode_c32.om").name == "decode_c32"
    assert "success" in (bundle / "om" / "decode_c32.log").read_text()
    assert not list((bundle / "om").glob(".*"))
    assert told[-1][1:] == (2, 2)


def test_a_refusal_keeps_the_bundle_and_what_was_made(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ir.CheckError, match="atc has no ai") as raised:
        build_om(bundle, _atc(tmp_path / "bin", refuses="prefill"))
    assert "E13010" in str(raised.value)
    assert "prefill_s8_c32.log" in str(raised.value)
    # The one after it was compiled all the same.
    assert [b.om for b in Manifest.load(bundle).buckets] == [None, "om/decode_c32.om"]


def test_a_second_run_does_what_is_missing(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cann" / "bin"
    shutil.copytree(tmp_path / "prepared", folder.parent / "prepared")
    (folder.parent / "version.cfg").write_text("version=8.1.RC1")  # both are the same atc
    with pytest.raises(ir.CheckError):
        build_om(bundle, _atc(folder, refuses="prefill"), jobs=1)
    assert _runs(_atc(folder)) == 2
    manifest = build_om(bundle, _atc(folder), jobs=1)
    assert _runs(_atc(folder)) == 3
    assert all(b.om for b in manifest.buckets)
    assert build_om(bundle, _atc(folder)) == manifest
    assert _runs(_atc(folder)) == 3


def test_a_changed_file_is_made_again(bundle: Path, tmp_path: Path) -> None:
    program = _atc(tmp_path / "bin")
    build_om(bundle, program)
    (bundle / "om" / "decode_c32.om").write_text("damaged")
    build_om(bundle, program)
    assert _runs(program) == 3
    assert read_om(bundle / "om" / "decode_c32.om").name == "decode_c32"


def test_a_damaged_weight_is_made_again(bundle: Path, tmp_path: Path) -> None:
    program = _atc(tmp_path / "bin")
    build_om(bundle, program)
    (bundle / "om" / "weight" / "weight_1").write_text("cut")
    build_om(bundle, program)
    assert (bundle / "om" / "weight" / "weight_1").read_text() == "shared\n"


def test_what_was_made_may_be_read_by_others(bundle: Path, tmp_path: Path) -> None:
    cache, program = AtcCache(tmp_path / "cache"), _atc(tmp_path / "bin")
    for _ in range(2):  # made, and from the cache
        build_om(bundle, program, cache=cache)
        assert (bundle / "om" / "decode_c32.om").stat().st_mode & 0o777 == 0o666 & ~_umask()
        (bundle / "om" / "decode_c32.om").unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_cache_that_cannot_be_written_does_not_matter(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    manifest = build_om(bundle, _atc(tmp_path / "bin"), cache=AtcCache(tmp_path / "cache"))
    assert all(bucket.om for bucket in manifest.buckets)
    assert "is not kept in" in caplog.text


def test_a_bundle_without_a_graph_is_incomplete(bundle: Path, tmp_path: Path) -> None:
    (bundle / "decode_c32.onnx").unlink()
    with pytest.raises(ir.InputError, match="is incomplete"):
        build_om(bundle, _atc(tmp_path / "bin"))


@pytest.mark.parametrize("name", ["decode_c32.onnx", "weights.bin"])
def test_a_file_that_is_not_the_one_that_was_built(bundle: Path, tmp_path: Path, name: str) -> None:
    """And nothing is kept in the cache under the hash that the manifest says."""
    cache, program = AtcCache(tmp_path / "cache"), _atc(tmp_path / "bin")
    data = bytearray((bundle / name).read_bytes())
    data[-1] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(ir.CheckError, match=f"{name} is not the file that was built"):
        build_om(bundle, program, cache=cache)
    assert _runs(program) == 0
    assert not cache.folder.exists()


def test_what_changes_while_atc_runs_is_not_kept(bundle: Path, tmp_path: Path) -> None:
    cache, program = AtcCache(tmp_path / "cache"), _atc(tmp_path / "bin")
    program.write_text(program.read_text() + "echo >> weights.bin\n")
    with pytest.raises(ir.CheckError, match=r"weights\.bin changed while atc ran"):
        build_om(bundle, program, cache=cache, jobs=1)
    assert not cache.folder.exists()
    assert [b.om for b in Manifest.load(bundle).buckets] == [None, None]


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (b"", "is empty"),
        (b"om of nothing\n" * 30, "is no .om file"),
        (None, "is not the .om of bucket decode_c32"),
    ],
)
def test_a_success_without_an_om_of_the_bucket_is_none(
    bundle: Path, tmp_path: Path, made: bytes | None, why: str
) -> None:
    """Neither from atc nor from the cache."""
    prepared = tmp_path / "prepared"
    cache, program = AtcCache(tmp_path / "cache"), _atc(tmp_path / "bin")
    good = (prepared / "decode_c32.om").read_bytes()
    other = (prepared / "prefill_s8_c32.om").read_bytes()
    (prepared / "decode_c32.om").write_bytes(other if made is None else made)
    with pytest.raises(ir.CheckError, match="atc does not compile decode_c32") as caught:
        build_om(bundle, program, cache=cache)
    assert why in str(caught.value)
    assert [b.om for b in Manifest.load(bundle).buckets] == ["om/prefill_s8_c32.om", None]
    (prepared / "decode_c32.om").write_bytes(good)
    build_om(bundle, program, cache=cache)
    assert _runs(program) == 3
    # An entry of the cache that somebody put there: it is made again.
    again = Path(shutil.copytree(bundle, tmp_path / "again"))
    shutil.rmtree(again / "om")
    manifest = Manifest.load(again)
    files = {name: item for name, item in manifest.files.items() if not name.startswith("om/")}
    bare = tuple(dataclasses.replace(bucket, om=None) for bucket in manifest.buckets)
    dataclasses.replace(manifest, buckets=bare, files=files).save(again)
    key = (bundle / "om" / "decode_c32.key").read_text().splitlines()[0]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "decode_c32.om").write_bytes(other if made is None else made)
    cache.store(key, tmp_path / "bad")
    build_om(again, program, cache=cache)
    assert _runs(program) == 4
    assert (again / "om" / "decode_c32.om").read_bytes() == good


def _changed(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = bundle / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(sealed(data)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["buckets"][0].update(name="../../victim"), "leads out of the folder"),
        (lambda data: data["buckets"][0]["command"].append("--output=/tmp/x"), "there twice"),
        (lambda data: data["buckets"][0]["command"].append("--debug_dir=/tmp/x"), "outside of"),
        (lambda data: data.update(weights="../weights.bin"), "leads out of the folder"),
    ],
)
def test_a_manifest_that_leads_out_of_the_bundle_is_refused(
    bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis").write_text("mine")
    _changed(bundle, change)
    program = _atc(tmp_path / "bin")
    with pytest.raises(ir.InputError, match=message):
        build_om(bundle, program)
    assert _runs(program) == 0
    assert (victim / "thesis").read_text() == "mine"


@pytest.mark.parametrize(
    ("link", "to"),
    [("om", "victim"), ("om/decode_c32.log", "victim/thesis"), ("om/weight", "victim")],
)
def test_a_link_that_leads_out_of_the_bundle_is_refused(
    bundle: Path, tmp_path: Path, link: str, to: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis").write_text("mine")
    (bundle / link).parent.mkdir(exist_ok=True)
    (bundle / link).symlink_to(tmp_path / to)
    with pytest.raises(ir.InputError, match="leads out of"):
        build_om(bundle, _atc(tmp_path / "bin"), jobs=1)
    assert [file.name for file in victim.iterdir()] == ["thesis"]
    assert (victim / "thesis").read_text() == "mine"


def test_weights_of_a_graph_are_the_bundles(bundle: Path, tmp_path: Path) -> None:
    graph = bundle / "decode_c32.onnx"
    (bundle / "secrets").write_bytes((bundle / "weights.bin").read_bytes())
    graph.write_bytes(graph.read_bytes().replace(b"weights.bin", b"secrets\0\0\0\0"))
    _reseal(bundle, **{graph.name: sha256(graph)})
    with pytest.raises(ir.InputError, match="secrets"):
        build_om(bundle, _atc(tmp_path / "bin"))


def test_the_work_of_a_killed_build_is_removed(bundle: Path, tmp_path: Path) -> None:
    (bundle / "om" / ".build" / "decode_c32").mkdir(parents=True)
    build_om(bundle, _atc(tmp_path / "bin"))
    assert not list((bundle / "om").glob(".*"))


def test_no_bundle_is_said_before_no_atc(tmp_path: Path) -> None:
    with pytest.raises(ir.InputError, match="manifest"):
        build_bundle(tmp_path, BuildOptions("none"))


def _reseal(bundle: Path, **hashes: str) -> None:
    """Change the manifest as somebody would who hands on a bundle of his own making."""
    manifest = Manifest.load(bundle)
    dataclasses.replace(manifest, files={**manifest.files, **hashes}).save(bundle)


def _break(bundle: Path, name: str) -> Callable[[], None]:
    """Put an operator into a graph that atc lacks; what is returned undoes it."""
    graph = bundle / name
    whole = graph.read_bytes()
    broken = whole.replace(b"MatMul", b"MatMux")
    assert broken != whole
    graph.write_bytes(broken)
    _reseal(bundle, **{name: sha256(graph)})

    def mend() -> None:
        graph.write_bytes(whole)
        _reseal(bundle, **{name: sha256(graph)})

    return mend


def test_the_report_of_the_pre_check_stays_out_of_the_bundle(bundle: Path) -> None:
    _break(bundle, "decode_c32.onnx")
    with pytest.raises(ir.CheckError):
        build_om(bundle, simulated_atc())
    assert not (bundle / "check_result.json").exists()
    assert (bundle / "om" / "decode_c32.check.json").is_file()


def test_compile_refuses_a_path_that_atc_refuses_before_it_begins(
    exported: Exported, tmp_path: Path
) -> None:
    options = dataclasses.replace(SMALL, build=BuildOptions("sim"))
    with pytest.raises(ir.InputError, match="atc refuses the path"):
        compile_bundle(exported("dynamo", "llama_mha"), tmp_path / "a b", options)
    assert not (tmp_path / "a b").exists()


def test_the_cache_saves_the_runs(bundle: Path, tmp_path: Path) -> None:
    cache, program = AtcCache(tmp_path / "cache"), _atc(tmp_path / "bin")
    first, again = bundle, Path(shutil.copytree(bundle, tmp_path / "again"))
    one = build_om(first, program, cache=cache)
    two = build_om(again, program, cache=cache)
    assert _runs(program) == 2
    assert [b.om for b in one.buckets] == [b.om for b in two.buckets]
    assert (again / "om" / "weight" / "weight_1").read_text() == "shared\n"


def test_compile_runs_the_atc_on_the_path(
    exported: Exported, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = _atc(tmp_path / "bin")
    _prepared(whole, tmp_path / "prepared")
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMFORGE_CACHE", str(tmp_path / "cache"))
    result = compile_bundle(exported("dynamo", "llama_mha"), tmp_path / "b", SMALL)
    assert all(b.om for b in result.manifest.buckets)


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_simulation_end_to_end(bundle: Path, tmp_path: Path, jobs: int) -> None:
    """In parallel, with a failure that is resumed, and a cache that is hit."""
    cache = AtcCache(tmp_path / "cache")
    mend = _break(bundle, "decode_c32.onnx")
    with pytest.raises(ir.CheckError, match="MatMux"):
        build_om(bundle, simulated_atc(), jobs=jobs, cache=cache)
    assert [bool(b.om) for b in Manifest.load(bundle).buckets] == [True, False]
    mend()
    manifest = build_om(bundle, simulated_atc(), jobs=jobs, cache=cache)
    for bucket in manifest.buckets:
        assert bucket.om is not None
        om = read_om(bundle / bucket.om)
        assert [t.name for t in om.models[0].inputs] == [spec.name for spec in bucket.inputs]
        names = [t.name.rpartition(":")[2] for t in om.models[0].outputs]
        assert names == [spec.name for spec in bucket.outputs]
    for bucket in manifest.buckets:
        (bundle / f"om/{bucket.name}.key").unlink()
        (bundle / f"om/{bucket.name}.log").unlink()
    assert build_om(bundle, simulated_atc(), cache=cache) == manifest
    assert not list((bundle / "om").glob("*.log"))  # nothing ran


def test_ctrl_c_ends_the_children_and_keeps_what_is_done(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    program = _atc(folder)
    text = program.read_text().replace(
        "--model=*NONE*)",
        f'--model=*decode*) mkdir tmp_weight_1_2; echo $$ > "{folder}/pid"; sleep 60 ;; --model=*NONE*)',
    )
    program.write_text(text)
    code = (
        "import signal, sys; from pathlib import Path\n"
        "from omforge.atc.build import build_om\n"
        # A shell without job control lets its background jobs, and theirs, ignore the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"try: build_om(Path({str(bundle)!r}), Path({str(program)!r}), jobs=2)\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    manifest = Manifest.load(bundle)
    while not (manifest.buckets[0].om and (folder / "pid").is_file()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        manifest = Manifest.load(bundle)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)
    assert [b.om for b in Manifest.load(bundle).buckets] == ["om/prefill_s8_c32.om", None]
    assert not list((bundle / "om").glob(".*"))
    assert not list(bundle.glob("tmp_weight_*"))


def test_kill_9_ends_the_children_too(bundle: Path, tmp_path: Path) -> None:
    """No handler of ours runs; what atc started goes with it, and the next build is whole."""
    folder = tmp_path / "bin"
    program = _atc(folder)
    text = program.read_text()
    program.write_text(
        text.replace(
            "--model=*NONE*)",
            f'--model=*decode*) sleep 60 & echo $$ $! > "{folder}/pids"; wait ;; --model=*NONE*)',
        )
    )
    code = (
        "from pathlib import Path; from omforge.atc.build import build_om\n"
        f"build_om(Path({str(bundle)!r}), Path({str(program)!r}), jobs=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 30
    while not ((folder / "pids").is_file() and (folder / "pids").read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    running = [int(pid) for pid in (folder / "pids").read_text().split()]
    while any(map(_alive, running)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    program.write_text(text)
    manifest = build_om(bundle, program)
    assert [b.om for b in manifest.buckets] == ["om/prefill_s8_c32.om", "om/decode_c32.om"]


def _alive(process: int) -> bool:
    """Whether it is there and has not ended: who has to ask for its end may never do so."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_gears_through_the_simulation(exported: Exported, tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, gears=True, build=BuildOptions("sim", cache=None))
    result = compile_bundle(exported("dynamo", "qwen2"), tmp_path / "b", options)
    (bucket,) = result.manifest.buckets
    assert bucket.om is not None
    om = read_om(result.folder / bucket.om).models[0]
    assert om.inputs[-1].name == GEAR_INPUT
    assert len(om.gears) == len(bucket.gears) == 2
