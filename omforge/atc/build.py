"""Run atc on the graphs of a finished bundle, and enter what it made in the manifest.

Each bucket is compiled in a folder of its own and moved into place when it is whole, so what is in
the bundle is complete whatever happens. A second run does only what is missing.
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from omforge import ir
from omforge.air.files import read_air
from omforge.atc.build_inputs import OM_FOLDER, BuildInputs
from omforge.atc.cache import AtcCache, cache_folder, hashes_below
from omforge.atc.children import Children
from omforge.atc.errors import diagnose
from omforge.atc.find import Atc, at_path, choose_atc
from omforge.atc.jobs import jobs_that_fit
from omforge.atc.run import SUCCESS, AtcResult, run_atc
from omforge.bundle.manifest import Bucket, Manifest
from omforge.ir.digests import sha256
from omforge.ir.folders import only_writer, recover
from omforge.ir.paths import inside, path_fault
from omforge.ir.weights import replacing, writing
from omforge.om import read_om
from omforge.om.fit import require_fit

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

FOLDER = OM_FOLDER
_WORK = ".build"  # the path goes into what atc makes, so it is the same in every run

# Where atc keeps external weights until the .om is written, in its working folder
# (hicann/ge:base/common/file_constant_utils/file_constant_utils.cc, GetTmpWeightDir). One that is
# killed leaves it behind.
_TEMPORARY = "tmp_weight_*_*"


@dataclass(frozen=True)
class BuildOptions:
    """How buckets are compiled.

    Attributes:
        atc: "auto", "sim", "none" or a path, as `choose_atc` takes it.
        jobs: Compilations at a time; 0: as many as memory and processors allow.
        cache: Where earlier results are looked up and kept; None: nowhere.
        trusted: Whether the bundle's commands may write outside of it.
    """

    atc: str = "auto"
    jobs: int = 0
    cache: Path | None = field(default_factory=cache_folder)
    trusted: bool = False


@dataclass(frozen=True)
class _Failure:
    bucket: Bucket
    result: AtcResult
    diagnostics: Sequence[ir.Diagnostic]
    said: str = ""


def build_om(
    folder: Path,
    program: Atc | Path,
    progress: Progress | None = None,
    *,
    jobs: int = 0,
    cache: AtcCache | None = None,
    trusted: bool = False,
) -> Manifest:
    """Compile every bucket to om/<bucket>.om; the bundle stays usable whatever atc does.

    A bucket that the manifest has an .om for, made by the same atc from the same files, is left
    alone. The others are compiled at the same time as far as memory goes; one that fails does not
    stop them, and each is entered as soon as it is done. A second build of the same bundle waits.

    Args:
        folder: A bundle.
        program: The atc to run.
        progress: Told the step's name, steps done and steps in all.
        jobs: Compilations at a time; 0: as many as memory and processors allow.
        cache: Where earlier results are looked up and kept.
        trusted: Whether the bundle's commands may write outside of it.

    Returns:
        The manifest, which names the files made.

    Raises:
        CheckError: A file of the bundle is not the one that was built; or atc refused a graph: its
            log is in the bundle, and the other buckets are entered in the manifest.
        InputError: atc cannot be started, or refuses the folder's path; or the bundle has a path
            or a command that leads out of it.
    """
    atc = program if isinstance(program, Atc) else at_path(program)
    folder = Path(os.path.abspath(folder))
    with only_writer(folder):
        return _Build(folder, atc, cache, progress, trusted=trusted).run(jobs)


def build_bundle(
    folder: Path, options: BuildOptions, progress: Progress | None = None
) -> dict[str, str]:
    """Compile what a bundle has no .om of yet, as the options say.

    Returns:
        The .om of each bucket.

    Raises:
        CheckError: atc refused a graph.
        InputError: There is no atc, or the folder is no bundle.
    """
    recover(folder)
    if Manifest.load(folder).front == "ort":  # (a folder that is no bundle is the nearer fault)
        raise ir.InputError(
            f"{folder} is a bundle for the CPU",
            "its graph has ONNX Runtime's own operators, which atc does not know",
            "Compile the export for a SoC: --target Ascend310P3, ...",
        )
    atc = choose_atc(options.atc)
    if atc is None:
        raise ir.InputError(
            "there is no atc to build with",
            "none is installed, or --atc none was given",
            "Install CANN and source its set_env.sh, or simulate with --atc sim",
        )
    cache = None if options.cache is None else AtcCache(options.cache)
    manifest = build_om(
        folder, atc, progress, jobs=options.jobs, cache=cache, trusted=options.trusted
    )
    return {bucket.name: bucket.om for bucket in manifest.buckets if bucket.om is not None}


class _Build:
    """One run over a bundle."""

    def __init__(
        self,
        folder: Path,
        atc: Atc,
        cache: AtcCache | None,
        progress: Progress | None,
        *,
        trusted: bool,
    ) -> None:
        self.folder = folder
        self.atc = atc
        self.cache = cache
        self.progress = progress
        self.manifest = Manifest.load(folder)
        self.inputs = BuildInputs(folder, self.manifest, trusted=trusted)
        self.children = Children()
        self.lock = threading.Lock()
        self.done = 0
        self.before = set(folder.glob(_TEMPORARY))
        for left in inside(folder, FOLDER).glob(f"{_WORK}*"):  # of a build that was killed
            _remove(folder, left)
        self.work = f"{FOLDER}/{_WORK}"

    def run(self, jobs: int) -> Manifest:
        buckets = self.manifest.buckets
        keys = {bucket.name: self.inputs.key(bucket, self.atc) for bucket in buckets}
        todo = [bucket for bucket in buckets if not self._is_made(bucket, keys[bucket.name])]
        self.done = len(buckets) - len(todo)
        self._told(f"atc: {self.done} of {len(buckets)} are made")
        jobs = jobs or self._jobs(len(todo))
        failures: list[_Failure] = []
        with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            futures = [pool.submit(self._compile, bucket, keys[bucket.name]) for bucket in todo]
            try:
                self._wait(futures, failures)
            except BaseException:  # Ctrl-C, or a program that does not start: nothing may stay
                self.children.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            finally:
                _remove(self.folder, self.folder / self.work)
                for left in set(self.folder.glob(_TEMPORARY)) - self.before:
                    _remove(self.folder, left)
        if failures:
            order = [bucket.name for bucket in buckets]
            raise _refused(sorted(failures, key=lambda item: order.index(item.bucket.name)))
        return self.manifest

    def _wait(self, futures: Sequence[Future[_Failure | None]], failures: list[_Failure]) -> None:
        pending = set(futures)
        while pending:
            # A wait without an end would keep Ctrl-C from being noticed on some systems.
            done, pending = wait(pending, timeout=0.5)
            failures += [item for item in (future.result() for future in done) if item is not None]

    def _told(self, step: str) -> None:
        if self.progress is not None:
            self.progress(step, self.done, len(self.manifest.buckets))

    def _stamp(self, bucket: Bucket) -> Path:
        return inside(self.folder, f"{FOLDER}/{bucket.name}.key")

    def _is_made(self, bucket: Bucket, key: str | None) -> bool:
        """Whether its .om is there, whole, and of this key, and its weights have their sizes."""
        stamp = self._stamp(bucket)
        if bucket.om is None or key is None or not stamp.is_file():
            return False
        stated, *files = stamp.read_text(encoding="utf-8").splitlines() or [""]
        if stated != key:
            return False
        for line in files:
            size, _, name = line.partition(" ")
            made = self.folder / FOLDER / name
            if path_fault(name) or not made.is_file() or str(made.stat().st_size) != size:
                return False
        file = self.folder / bucket.om
        return file.is_file() and sha256(file) == self.manifest.files.get(bucket.om)

    def _compile(self, bucket: Bucket, key: str | None) -> _Failure | None:
        """Make one bucket, from the cache or by running atc."""
        work = inside(self.folder, f"{self.work}/{bucket.name}")
        with writing(work):
            work.mkdir(parents=True)
        self._told(f"atc {bucket.name}")
        if self.cache is not None and key is not None and self._restored(bucket, key, work):
            log.info("%s: from the cache %s", bucket.name, self.cache.folder)
            self._enter(bucket, work, key)
            return None
        result = self._run(bucket, work)
        if not result.ok or result.om is None:
            return _Failure(bucket, result, _diagnose(self.folder / bucket.file, result))
        for code, line in result.codes.items():
            if not code.startswith("E"):
                log.warning("%s: %s", bucket.name, line)
        self.inputs.require_unchanged(bucket)
        try:
            require_fit(read_om(result.om), bucket, self.manifest.front)
        except ir.InputError as error:
            return _Failure(bucket, result, (), f"{SUCCESS!r}, but {error.what}: {error.why}")
        if self.cache is not None and key is not None:
            try:
                self.cache.store(key, work)
            except OSError as error:  # a full disk: what was made is still good
                log.warning("%s is not kept in %s: %s", bucket.name, self.cache.folder, error)
        self._enter(bucket, work, key)
        return None

    def _restored(self, bucket: Bucket, key: str, work: Path) -> bool:
        """Take the bucket's files from the cache, if it has them and they are what they should."""
        if self.cache is None or self.cache.restore(key, work) is None:
            return False
        try:
            require_fit(read_om(_om_in(work, bucket)), bucket, self.manifest.front)
        except ir.InputError as error:
            log.warning("%s: not taken from %s: %s", bucket.name, self.cache.folder, error)
            shutil.rmtree(work)
            work.mkdir()
            return False
        return True

    def _run(self, bucket: Bucket, work: Path) -> AtcResult:
        # The command as it is, but for the folder: the .om keeps its name and its weights' places.
        output = f"--output={self.work}/{bucket.name}/{bucket.name}"
        command = [output if word.startswith("--output=") else word for word in bucket.command]
        if not any(word.startswith("--check_report") for word in command):
            # atc writes it where a check failed, else to check_result.json in the bundle.
            report = f"{FOLDER}/{bucket.name}.check.json"
            inside(self.folder, report)
            command.append(f"--check_report={report}")
        return run_atc(
            command,
            self.folder,
            inside(self.folder, f"{FOLDER}/{bucket.name}.log"),
            program=self.atc,
            on_line=lambda line: log.info("%s: %s", bucket.name, line),
            children=self.children,
        )

    def _enter(self, bucket: Bucket, work: Path, key: str | None) -> None:
        """Move what was made into place, and enter it in the manifest."""
        made = hashes_below(work)
        sizes = {name: (work / name).stat().st_size for name in made}
        om = f"{FOLDER}/{_om_in(work, bucket).name}"
        with self.lock:
            for name in made:
                target = inside(self.folder, f"{FOLDER}/{name}")
                with writing(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(work / name, target)
            buckets = tuple(
                dataclasses.replace(b, om=om) if b.name == bucket.name else b
                for b in self.manifest.buckets
            )
            files = {**self.manifest.files, **{f"{FOLDER}/{n}": h for n, h in made.items()}}
            self.manifest = dataclasses.replace(self.manifest, buckets=buckets, files=files)
            self.manifest.save(self.folder)
            if key is not None:
                lines = [key, *(f"{sizes[name]} {name}" for name in made)]
                stamp = self._stamp(bucket)
                with writing(stamp), replacing(stamp) as temporary:
                    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            self.done += 1
        self._told(f"atc {bucket.name} done")

    def _jobs(self, todo: int) -> int:
        weights = self.folder / self.manifest.weights
        size = weights.stat().st_size if weights.is_file() else 0
        return jobs_that_fit(todo, size, simulated=self.atc.simulated)


def _om_in(work: Path, bucket: Bucket) -> Path:
    """The .om of a bucket in the folder that atc wrote: it may name the host behind the bucket."""
    found = sorted(work.glob(f"{glob.escape(bucket.name)}*.om"))
    if not found:
        raise ir.InputError(f"{work} has no .om of bucket {bucket.name}", "", "Run atc again")
    return found[0]


def _remove(folder: Path, left: Path) -> None:
    """Delete a folder of ours; one that a link makes another's is left alone, and named."""
    if left.is_symlink():
        raise ir.InputError(
            f"{left} is a link", f"{folder} should hold a folder there", "Remove it"
        )
    shutil.rmtree(left, ignore_errors=True)


def _diagnose(graph: Path, result: AtcResult) -> Sequence[ir.Diagnostic]:
    try:
        read = read_air(graph) if graph.suffix == ".air" else ir.load(graph)
    except ir.OmforgeError:
        read = None  # what atc says is told anyway, without our places
    return diagnose(result.lines, read)


def _refused(failures: Sequence[_Failure]) -> ir.CheckError:
    files = ", ".join(failure.bucket.file for failure in failures)
    logs = ", ".join(str(failure.result.log) for failure in failures)
    told: list[str] = []
    for failure in failures:
        said = ir.format_diagnostics(failure.diagnostics) if failure.diagnostics else ""
        said = (
            failure.said
            or said
            or "; ".join(failure.result.codes.values())
            or failure.result.ending()
        )
        told.append(f"{failure.bucket.file}: {said}" if len(failures) > 1 else said)
    return ir.CheckError(
        f"atc does not compile {files}",
        "\n".join(told),
        f"Its log is {logs}; the bundle's graphs are complete, and `omforge build` tries again",
    )
