#!/usr/bin/env python3
"""Asks what only CANN and a device can tell: the runner of a kit of probes.

It stands alone: Python 3.8, numpy and CANN's own `acl`, no omforge. A kit is the folder that holds
this file as `probe.py`, with `kit.json` and the models. `omforge probe` runs this very file too.

    python3 probe.py --target Ascend310P3                   # atc and device 0
    python3 probe.py --target Ascend310P3 --backend none    # atc alone: no device here

Each probe is a process of its own: a crash of atc, of a driver or of the process answers one
question and ends no other. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import glob
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Callable, Dict

import numpy as np

SCHEMA, SUCCESS = 1, "ATC run success"
CODE = re.compile(r"\b([EW][0-9A-Z]\d{4})\b")
SIMULATED, NOT_SIMULATED = b"omforge-atc-sim", re.compile("SIM000|SIM062")
STAMP = re.compile(r"\[PID: \d+\] \S+ ")
CONTROL = "onnx-taken"  # what all others stand on
LOST_INPUT = "E18888"  # a plugin lost an input, and atc says that it succeeded
CANNOT_ANSWER = ("E10021", "E10022", "E10054", "E13026")
"""Codes that are about this machine's paths and the command, not about the question."""

_INFO = "ascend_toolkit_install.info"
VERSION_FILES = (f"*-linux/{_INFO}", _INFO, "version.cfg", "compiler/version.info", "version.info")
VERSION = re.compile(r"^\s*(?:version|\w*running_version)\s*=\s*\[?([^\s\]:]+)", re.I | re.M)

HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
LOAD_TYPE, LOAD_PATH, FROM_FILE = 1, 2, 1
REPEATS, SLACK = 20, 1024

CHILDREN: set[Any] = set()  # the processes that run

Json = Dict[str, Any]
Options = Any  # an argparse.Namespace


class Refused(Exception):
    """atc refused a model; the text is the evidence."""

    def __init__(self, text: str, codes: list[str]) -> None:
        super().__init__(text)
        self.codes = codes


class NoAnswer(Exception):
    """Nothing follows from this; the text says why."""


class Failed(Exception):
    """A call on the device failed; the text names it and its code."""


def ask(kit: str, probe: Json, options: Options, stage: Callable[[str], None]) -> Json:
    """Answer one question: build its models, run them, and compare with what each value means."""
    found: Json = {"value": None, "number": None, "evidence": "", "simulated": False}
    work = f"{options.work}/{probe['id']}"
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    try:
        stage("build")
        oms = {build["name"]: build_om(kit, work, build, options) for build in probe["builds"]}
        held = (np.fromfile(om, np.uint8).tobytes() for om in oms.values())
        found["simulated"] = any(SIMULATED in data for data in held)
        if probe.get("count"):
            count = len(glob.glob(os.path.join(work, probe["count"])))
            found["value"] = probe["counts"].get(str(count))
            found["evidence"] = f"{count} files {probe['count']}"
        elif not probe["steps"]:
            found["value"] = probe["built"]
            found["evidence"] = "atc built it" if oms else ""
        elif options.backend == "none":
            found["evidence"] = "atc built it; no device was asked"
        else:
            stage("run")
            found.update(run_on_device(kit, probe, oms, options.device))
    except Refused as error:
        values = [probe["codes"][code] for code in error.codes if code in probe["codes"]]
        found["value"] = values[0] if values else probe["refused"] or None
        found["evidence"] = str(error)
    except Failed as error:
        found["value"] = probe["failed"] or None
        found["evidence"] = str(error)
    except NoAnswer as error:
        found["evidence"] = str(error)
    return found


def build_om(kit: str, work: str, build: Json, options: Options) -> str:
    """Compile one model; return the .om.

    Raises:
        Refused: atc says no.
        NoAnswer: It cannot be run, or stumbles over something else.
    """
    output = os.path.join(work, build["name"])
    command = [*shlex.split(options.atc), f"--framework={build['framework']}"]
    command += ["--model=" + os.path.join(kit, build["model"]), "--output=" + output]
    command += ["--soc_version=" + options.target, "--input_format=ND", "--log=error"]
    command += build["flags"]
    try:
        # In the kit's folder: a GE graph names its weights file as it lies there.
        null, pipe, both = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
        done = subprocess.run(command, cwd=kit, check=False, stdin=null, stdout=pipe, stderr=both)
    except OSError as error:
        raise NoAnswer(f"cannot run {command[0]}: {error}") from error
    text = done.stdout.decode("utf-8", "replace")
    with open(os.path.join(work, build["name"] + ".log"), "w", encoding="utf-8") as log:
        log.write(" ".join(map(shlex.quote, command)) + "\n" + text)
    codes = list(dict.fromkeys(CODE.findall(text)))
    made = sorted(glob.glob(output + ".om") + glob.glob(output + "_*_*.om"))
    if done.returncode == 0 and SUCCESS in text and LOST_INPUT not in codes and made:
        return made[0]
    if beyond := NOT_SIMULATED.search(text):
        raise NoAnswer(f"the simulated atc does not do that: {_line(text, beyond.group())}")
    about_us = [code for code in codes if code in CANNOT_ANSWER]
    if about_us:
        raise NoAnswer(f"atc stumbles over something else: {_line(text, about_us[0])}")
    if done.returncode in (126, 127, 137, -9):  # not there, or killed
        raise NoAnswer(f"atc cannot be run: {_last_line(text)}")
    if done.returncode < 0:
        raise Refused(f"{build['name']}: atc crashed (signal {-done.returncode})", codes)
    errors = [code for code in codes if code.startswith("E")]
    said = _line(text, errors[0]) if errors else _last_line(text)
    raise Refused(f"{build['name']}: atc says {said}", codes)


def _line(text: str, word: str) -> str:
    found = [STAMP.sub("", line.strip()) for line in text.splitlines() if word in line]
    return max(found, key=len)[:300]  # "EZ9999: Inner Error!" comes ahead of what it was


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing"


# The device


class Device:
    """pyACL: a context, a stream, buffers by name and models by name; all given back at the end."""

    def __init__(self, number: int) -> None:
        try:
            self.acl: Any = importlib.import_module("acl")
        except ImportError as error:
            raise NoAnswer(f"there is no pyACL here: {error}") from error
        self.number = number
        self.undo: list[tuple[Any, ...]] = []
        self.buffers: dict[str, tuple[int, int]] = {}
        self.models: dict[str, tuple[int, int]] = {}
        self.begin()

    def begin(self) -> None:
        """Take the device."""
        rt = self.acl.rt
        self.call("init")
        self.undo.append((self.acl.finalize,))
        ret = rt.set_device(self.number)
        if ret:
            raise NoAnswer(f"device {self.number} cannot be taken: code {ret}")
        self.undo.append((rt.reset_device, self.number))
        self.undo.append((rt.destroy_context, self.call("rt.create_context", self.number)))
        self.stream = self.call("rt.create_stream")
        self.undo.append((rt.destroy_stream, self.stream))

    def end(self) -> None:
        """Give everything back, in reverse."""
        while self.undo:
            call = self.undo.pop()
            call[0](*call[1:])
        self.buffers.clear()
        self.models.clear()

    def call(self, name: str, *given: Any) -> Any:
        """Call `acl.<name>`, whose result is a code or ends with one; return what comes before."""
        function: Any = self.acl
        for part in name.split("."):
            function = getattr(function, part)
        result = function(*given)
        values: list[Any] = list(result) if hasattr(result, "__len__") else [result]
        ret = values.pop()
        if ret:
            tell = getattr(self.acl, "get_recent_err_msg", None)
            said = str(tell()).strip().splitlines() if tell is not None else []
            raise Failed(f"acl.{name} returned {ret} {said[0][:200] if said else ''}".strip())
        return values[0] if len(values) == 1 else values

    def buffer(self, name: str, size: int) -> int:
        """The address of a buffer of at least that size, made when it is first asked for."""
        if name not in self.buffers:
            room = size + SLACK  # a tensor in an .om may be larger than its shape says
            self.buffers[name] = (self.call("rt.malloc", room, 0), room)
            self.undo.append((self.acl.rt.free, self.buffers[name][0]))
        address, had = self.buffers[name]
        if had < size:
            raise NoAnswer(f"buffer {name} has {had} bytes, the model wants {size}")
        return address

    def write(self, name: str, array: Any, size: int = 0) -> None:
        """Fill a buffer from the host."""
        data = np.ascontiguousarray(array).tobytes()
        address = self.buffer(name, max(size, len(data)))
        pointer = self.acl.util.bytes_to_ptr(data)
        self.call("rt.memcpy", address, len(data), pointer, len(data), HOST_TO_DEVICE)

    def read(self, name: str, size: int) -> bytes:
        """The first bytes of a buffer."""
        host = self.call("rt.malloc_host", size)
        try:
            self.call("rt.memcpy", host, size, self.buffers[name][0], size, DEVICE_TO_HOST)
            return ctypes.string_at(host, size)
        finally:
            self.acl.rt.free_host(host)

    def load(self, name: str, oms: dict[str, str], how: str) -> None:
        """Load a model: `file`, with the `workspace` of all, or with `weights` that are there."""
        mdl, path = self.acl.mdl, oms[name]
        if how == "workspace":
            size = max(int(self.call("mdl.query_size", om)[0]) for om in oms.values())
            work = self.buffer("the workspace", size)
            model = self.call("mdl.load_from_file_with_mem", path, work, size, 0, 0)
        elif how == "weights":
            model = self.load_with_weights(path)
        else:
            model = self.call("mdl.load_from_file", path)
        self.undo.append((mdl.unload, model))
        desc = mdl.create_desc()
        self.undo.append((mdl.destroy_desc, desc))
        self.call("mdl.get_desc", desc, model)
        self.models[name] = (model, desc)

    def load_with_weights(self, path: str) -> int:
        """Load a model whose weight files are on the device already."""
        if not hasattr(self.acl.mdl, "set_external_weight_address"):
            raise Failed("acl.mdl has no set_external_weight_address")
        handle = self.acl.mdl.create_config_handle()
        try:
            self.call("mdl.set_config_opt", handle, LOAD_TYPE, FROM_FILE)
            self.call("mdl.set_config_opt", handle, LOAD_PATH, path)
            for file in sorted(glob.glob(os.path.join(os.path.dirname(path), "weight", "*"))):
                data = np.fromfile(file, np.uint8)
                size = (data.nbytes + 31) // 32 * 32
                self.write(file, data, size)
                given = (handle, os.path.basename(file), self.buffers[file][0], size)
                self.call("mdl.set_external_weight_address", *given)
            return int(self.call("mdl.load_with_config", handle))
        finally:
            self.acl.mdl.destroy_config_handle(handle)

    def dataset(self, model: str, side: str, names: list[str]) -> int:
        """A dataset over named buffers for the inputs or outputs of a model."""
        acl, desc = self.acl, self.models[model][1]
        count = getattr(acl.mdl, f"get_num_{side}s")(desc)
        if count != len(names):
            raise Failed(f"{model} has {count} {side}s, {len(names)} are given")
        dataset = int(acl.mdl.create_dataset())
        self.undo.append((acl.mdl.destroy_dataset, dataset))
        for index, name in enumerate(names):
            size = int(getattr(acl.mdl, f"get_{side}_size_by_index")(desc, index))
            held = acl.create_data_buffer(self.buffer(name, size), size)
            self.undo.append((acl.destroy_data_buffer, held))
            self.call("mdl.add_dataset_buffer", dataset, held)
        return dataset

    def run(self, step: Json, repeats: int = 1) -> float:
        """Run a model; return the seconds of the fastest run."""
        model = self.models[step["model"]][0]
        inputs = self.dataset(step["model"], "input", step["inputs"])
        outputs = self.dataset(step["model"], "output", step["outputs"])
        best = float("inf")
        for _ in range(repeats):
            started = time.perf_counter()
            self.call("mdl.execute", model, inputs, outputs)
            best = min(best, time.perf_counter() - started)
        return best

    def in_stream(self, name: str, *given: Any) -> None:
        """Queue a copy within the device, and wait for it."""
        self.call(name, *given, DEVICE_TO_DEVICE, self.stream)
        self.call("rt.synchronize_stream", self.stream)


def run_on_device(kit: str, probe: Json, oms: dict[str, str], number: int) -> Json:
    """Do a probe's steps, and say which value fits what was found."""
    device = Device(number)
    try:
        found: Json = {"simulated": hasattr(device.acl, "sim")}
        measured = [_step(device, kit, step, oms) for step in probe["steps"]]
        figures = [figure for figure in measured if figure is not None]
        if figures:
            figure: float = figures[0] / figures[1] if len(figures) > 1 else figures[0]
            found["value"] = probe["over"][0 if figure > probe["more_than"] else 1]
            found["number"], found["evidence"] = figure, f"{figure:.6g} {probe['unit']}"
        else:
            found["value"], found["evidence"] = _judged(device, kit, probe)
        return found
    finally:
        device.end()


def _step(device: Device, kit: str, step: Json, oms: dict[str, str]) -> float | None:
    """Do one step; return the figure of one that measures."""
    do = step["do"]
    if do == "load":
        device.load(step["model"], oms, step["how"])
    elif do == "fill":
        room = np.zeros(step["bytes"], np.uint8) if "bytes" in step else None
        device.write(
            step["buffer"], np.load(os.path.join(kit, step["from"])) if room is None else room
        )
    elif do == "run":
        device.run(step)
    elif do == "time":
        seconds = device.run(step, REPEATS)
        return step["bytes"] / seconds / 1e9 if step["bytes"] else seconds * 1e6
    elif do == "size":
        return float(device.call("mdl.query_size", oms[step["model"]])[0])
    elif do == "again":
        device.end()
        device.begin()
    elif do in ("copy", "copy2d"):
        to, source = device.buffers[step["to"]][0], device.buffers[step["from"]][0]
        if do == "copy":
            size = step["bytes"]
            device.in_stream("rt.memcpy_async", to + step["offset"], size, source, size)
        else:
            sizes = (step["to_pitch"], source, step["from_pitch"], step["width"], step["rows"])
            device.in_stream("rt.memcpy2d_async", to, *sizes)
    else:
        raise NoAnswer(f"this probe.py does not know the step {do}")
    return None


def _judged(device: Device, kit: str, probe: Json) -> tuple[str | None, str]:
    told: list[str] = []
    for value, wanted in probe["judged"].items():
        worst = 0.0
        for name, file in wanted.items():
            array = np.load(os.path.join(kit, file))
            data = device.read(name, array.nbytes)
            found = np.frombuffer(data, array.dtype).reshape(array.shape)
            worst = max(worst, difference(found, array, probe["rtol"], probe["atol"]))
        if worst <= 1.0:
            return value, f"the numbers are those of {value!r}"
        told.append(f"{value!r} is {worst:.3g} tolerances away")
    return probe["otherwise"] or None, "the numbers are others: " + "; ".join(told)


def difference(found: Any, wanted: Any, rtol: float, atol: float) -> float:
    """The largest difference in tolerances; infinities and NaN have to be at the same places."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    same = finite | (a == b) | (np.isnan(a) & np.isnan(b))
    if not same.all():
        return float("inf")
    far = np.abs(a[finite] - b[finite]) / (atol + rtol * np.abs(b[finite]))
    return float(far.max()) if far.size else 0.0


# All probes


def read_kit(folder: str) -> Json:
    """The kit, with its hash."""
    with open(os.path.join(folder, "kit.json"), "rb") as file:
        data = file.read()
    kit: Json = json.loads(data.decode("utf-8"))
    if kit.get("schema") != SCHEMA:
        raise SystemExit("kit.json is of another version than this probe.py")
    kit["hash"] = hashlib.sha256(data).hexdigest()
    return kit


def run_probe(folder: str, probe: Json, options: Options) -> Json:
    """Run one probe as a process; whatever becomes of it is an answer."""
    out = f"{options.work}/{probe['id']}.json"
    if os.path.exists(out):
        os.remove(out)
    command = [sys.executable, os.path.join(folder, "probe.py"), "--one", probe["id"]]
    command += ["--target", options.target, "--atc", options.atc, "--backend", options.backend]
    command += ["--device", str(options.device), "--work", options.work, "-o", out]
    started = time.time()
    limit = options.timeout or probe["limit"]
    with open(f"{options.work}/{probe['id']}.log", "wb") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=options.environment,
        )
        CHILDREN.add(child)
        try:
            status: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(child)  # what it started must not outlive it
    found: Json = _kept(out)
    stage = found.pop("stage", "start")
    if stage != "done":
        how = f"no answer within {limit:g} seconds" if status is None else f"it ended with {status}"
        found = {"value": None, "number": None, "evidence": f"{how} ({stage})", "simulated": False}
        # A crash is an answer; SIGKILL is memory that ran out, or somebody.
        if stage == "run" and status is not None and status < 0 and status != -signal.SIGKILL:
            found["value"] = probe["failed"] or None
    found["seconds"] = round(time.time() - started, 1)
    return found


def _end(child: Any) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    CHILDREN.discard(child)


def _kept(path: str) -> Json:
    try:
        with open(path, encoding="utf-8") as file:
            found: Any = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if hasattr(found, "keys") else {}


def write_json(path: str, data: Json) -> None:
    """Write a file whole or not at all."""
    part = f"{path}.{os.getpid()}.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def believed(probe: Json, found: Json, answers: dict[str, Json]) -> Json:
    """An answer counts only where the probes that it stands on gave theirs."""
    for control in probe["after"]:
        name, _, values = control.partition("=")
        seen = answers.get(name, {}).get("value")
        if found["value"] is not None and seen not in values.split("|"):
            doubt = f"it said {found['value']!r}, which says nothing while {name} is {seen!r}"
            return dict(found, value=None, number=None, evidence=doubt + ": " + found["evidence"])
    return found


def with_controls(kit: Json, only: list[str]) -> list[Json]:
    """The probes that are asked for, all if none is, and those that they stand on."""
    by_name = {probe["id"]: probe for probe in kit["probes"]}
    wanted: set[str] = set()
    queue = list(only or by_name)
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted.add(name)
            queue += [control.partition("=")[0] for control in by_name[name]["after"]]
    return [probe for probe in kit["probes"] if probe["id"] in wanted]


def answer_kit(folder: str, options: Options, tell: Callable[..., None]) -> Json:
    """Answer the probes of a kit; the result file has what is known after each.

    Args:
        folder: The kit's.
        options: The command line.
        tell: Told a probe's id, its answer, and how many are answered, and of how many.
    """
    kit = read_kit(folder)
    by_name = {probe["id"]: probe for probe in kit["probes"]}
    wrong = sorted(set(options.only) - set(by_name))
    if wrong:
        raise SystemExit("there is no probe " + ", ".join(wrong))
    if options.target != kit["soc"]:
        raise SystemExit(f"this kit is for {kit['soc']}")
    head: Json = {"schema": SCHEMA, "kit": kit["hash"], "soc": options.target}
    head.update(cann=options.cann or cann_version(options.atc), backend=options.backend)
    before = _kept(options.output)
    raw: dict[str, Json] = {}
    interrupted = before.get("complete") is False and not options.again
    if interrupted and all(before.get(name) == head[name] for name in head):
        raw = {n: a for n, a in before["answers"].items() if a["value"] is not None}
        if raw.get(CONTROL, {}).get("value") != "taken":  # that has been mended, perhaps
            raw = {}
    asked = with_controls(kit, options.only)
    with ThreadPoolExecutor(max_workers=max(1, options.jobs)) as pool:
        left = [probe for probe in asked if probe["id"] not in raw]
        jobs = {pool.submit(run_probe, folder, probe, options): probe["id"] for probe in left}
        try:
            for job in as_completed(jobs):
                raw[jobs[job]] = job.result()
                write_json(options.output, dict(head, complete=False, answers=raw))
                tell(jobs[job], raw[jobs[job]], len(raw), len(asked))
        except BaseException:
            for job in jobs:
                job.cancel()
            for child in [*CHILDREN]:
                _end(child)
            raise
    answers = {name: believed(by_name[name], raw[name], raw) for name in raw}
    simulated = any(found["simulated"] for found in answers.values())
    found = dict(head, complete=True, simulated=simulated, answers=answers)
    write_json(options.output, found)
    return found


def cann_version(atc: str) -> str:
    """The version of the CANN around an atc; "" where no file says so."""
    program = shutil.which(shlex.split(atc)[0]) or ""
    for place in (program, os.path.realpath(program)):
        for _ in range(4):
            place = os.path.dirname(place)
            # Nothing of CANN is right below the root.
            patterns = VERSION_FILES if place.count(os.sep) > 1 else ()
            for file in (f for each in patterns for f in glob.glob(os.path.join(place, each))):
                with open(file, encoding="utf-8", errors="replace") as text:
                    found = VERSION.search(text.read())
                if found:
                    return found.group(1)
    return ""


def one(folder: str, options: Options) -> int:
    """Be the process of one probe."""
    probe = next(p for p in read_kit(folder)["probes"] if p["id"] == options.one)
    with open(os.path.join(options.work, "device.lock"), "wb") as lock:

        def stage(name: str) -> None:
            write_json(options.output, {"stage": name})
            if name == "run":  # one at a time on the device: times and memory are its own
                fcntl.flock(lock, fcntl.LOCK_EX)

        write_json(options.output, dict(ask(folder, probe, options, stage), stage="done"))
    return 0


def arguments(words: list[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--target", required=True, help="the SoC, as atc's --soc_version")
    add("--atc", default="atc", help="the program that compiles")
    add("--backend", choices=("acl", "none"), default="acl", help="none: no device")
    add("--device", type=int, default=0, help="its number")
    add("--only", action="append", default=[], help="one probe's id; repeatable")
    add("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    add("--timeout", type=float, default=0, help="seconds for each probe")
    add("--cann", default="", help="its version, where no file beside atc says it")
    add("--again", action="store_true", help="ask what was answered before, too")
    add("--work", default="work", help="a folder for what is built")
    add("--one", default="", help=argparse.SUPPRESS)
    add("-o", "--output", default="result.json", help="the result file")
    return parser.parse_args(words, argparse.Namespace(environment=None))


def main() -> int:
    """Run as a program."""
    folder = os.path.dirname(os.path.abspath(__file__))
    options = arguments()
    options.work, options.output = map(os.path.abspath, (options.work, options.output))
    os.makedirs(options.work, exist_ok=True)
    if options.one:
        return one(folder, options)

    def tell(name: str, found: Json, done: int, total: int) -> None:
        print(f"[{done}/{total}] {name}: {found['value']} ({found['evidence']})", flush=True)

    answer_kit(folder, options, tell)
    print(f"{options.output} has the answers: omforge probe --read {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
