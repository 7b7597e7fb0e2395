"""One step of decode on the CPU: the export, the canonical graph, and the graph of --target cpu.

    python benchmarks/decode.py EXPORT [--context 128,2048,8192] [--steps 12] [--quantize int4:g32]
                                [--scratch DIR]

Each row is a process of its own, in turns; the figures are milliseconds a step, the least and the
median. A cache of that many tokens is filled with what one token made, repeated: time does not
depend on what is in it. Beside them: what reading the weights and the cache once takes at the
bandwidth of that minute, measured by adding up 1 GiB on all threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

LEVELS = ("export", "canonical", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--context", default="128,2048,8192")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--quantize", default="")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--levels", default="")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        level, context, bundle = given.one
        times = RUNS[level](given.export, Path(bundle), int(context), given.steps)
        print(json.dumps(times))
        return
    lengths = [int(part) for part in given.context.split(",")]
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        bundle = compiled(given.export, Path(folder) / "bundle", max(lengths) + 64, given.quantize)
        weights = (bundle / "weights.bin").stat().st_size
        levels = given.levels.split(",") if given.levels else LEVELS
        levels = [level for level in levels if level != "export" or not given.quantize]
        print(
            "| context | bandwidth GB/s | weights + cache once, ms | " + " | ".join(levels) + " |"
        )
        print("|---" * (3 + len(levels)) + "|")
        for context in lengths:
            row = [timed(given, level, context, bundle) for level in levels]
            speed = bandwidth()
            least = (weights + cache_bytes(bundle, context)) / speed * 1e3
            cells = [f"{min(t) * 1e3:.1f} / {statistics.median(t) * 1e3:.1f}" for t in row]
            print(f"| {context} | {speed / 1e9:.1f} | {least:.1f} | " + " | ".join(cells) + " |")


def compiled(export: Path, bundle: Path, context: int, quantize: str) -> Path:
    import omforge

    omforge.compile(export, target="cpu", output=bundle, context=context, quantize=quantize)
    return bundle


def cache_bytes(bundle: Path, context: int) -> int:
    from omforge.bundle.manifest import Manifest

    kv = Manifest.load(bundle).kv
    each = sum(x.kv_heads * (x.head_size + x.value_head_size) for x in kv.each_layer)
    return each * context * np.dtype(kv.dtype).itemsize


def bandwidth() -> float:
    """Bytes a second that two threads read."""
    parts = [np.ones(1 << 27, np.float32) for _ in range(2)]
    best = 0.0
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            begin = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, sum(p.nbytes for p in parts) / (time.perf_counter() - begin))
    return best


def timed(given: argparse.Namespace, level: str, context: int, bundle: Path) -> list[float]:
    words = [sys.executable, __file__, str(given.export), "--steps", str(given.steps)]
    words += ["--one", level, str(context), str(bundle)]
    made = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(made.strip().splitlines()[-1])


def repeated(step: Callable[[], Any], steps: int) -> list[float]:
    times: list[float] = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return times[1:]


def run_export(export: Path, bundle: Path, context: int, steps: int) -> list[float]:
    """Its cache grows, so each step's is fed as the one before returned it."""
    import onnxruntime

    from omforge.bundle.manifest import Manifest

    told = Manifest.load(bundle).export
    session = onnxruntime.InferenceSession(
        export / "model.onnx" if export.is_dir() else export, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    caches = {pair[i] for pair in told.past for i in range(2)}
    feeds: dict[str, Any] = {}
    for spec in session.get_inputs():
        shape = [dim if isinstance(dim, int) else 1 for dim in spec.shape]
        if spec.name in caches:
            shape[2] = context
            feeds[spec.name] = np.zeros(shape, np.float32)
        elif "mask" in spec.name:
            feeds[spec.name] = np.ones((1, context + 1), np.int64)
        elif "position" in spec.name:
            feeds[spec.name] = np.full((1, 1), context)
        else:
            feeds[spec.name] = np.ones((1, 1), np.int64)
    wanted = ["logits", *(name for name in names if name != "logits")]
    return repeated(lambda: session.run(wanted, feeds), steps)


def run_canonical(export: Path, bundle: Path, context: int, steps: int) -> list[float]:
    del export
    from omforge.runtime.bundle import Bundle
    from omforge.runtime.generate import LanguageModel

    with LanguageModel(Bundle.open(bundle), "canonical") as model:
        model.prefill([[1]])
        model.repeat_past(context)
        return repeated(lambda: model.decode([1]), steps)


def run_cpu(export: Path, bundle: Path, context: int, steps: int) -> list[float]:
    del export
    from omforge.runtime.bundle import Bundle
    from omforge.runtime.cpu_session import CpuBackend
    from omforge.runtime.generate import LanguageModel

    opened = Bundle.open(bundle)
    backend = CpuBackend(opened)
    with LanguageModel(opened, backend=backend) as model:
        model.prefill([[1]])
        for buffer in backend.cache().buffers.values():
            buffer[:, :, 1:context] = buffer[:, :, :1]
        backend.cache().length = context
        return repeated(lambda: model.decode([1]), steps)


RUNS = {"export": run_export, "canonical": run_canonical, "cpu": run_cpu}

if __name__ == "__main__":
    main()
