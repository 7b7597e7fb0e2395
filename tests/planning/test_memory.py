"""The memory map against what a bundle holds: files, manifest, and the CPU's own peak."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omforge import ir
from omforge.bundle.manifest import Manifest
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.planning.activations import peak_bytes
from omforge.planning.memory import MemoryMap, memory_map
from omforge.planning.subject import open_subject

Exported = Callable[[str, str], Path]
EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "docs-llama-onnx"
SIZES: dict[str, Any] = {"context": 32, "prefill": (4, 8)}


def planned(path: Path, options: CompileOptions) -> MemoryMap:
    subject = open_subject(path, options)
    return memory_map(subject.lower(subject.options), subject.fixed)


def held_by_file(folder: Path, made: Manifest) -> int:
    """Bytes of the constants of the last bucket's file."""
    model = ir.load(folder / made.buckets[-1].file)
    return sum(tensor.nbytes for _, tensor in ir.all_tensors(model))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama_gqa", {}),
        ("llama_gqa", {"quantize": "int4:g32:asym", "soc": "Ascend910B4"}),
        ("llama_gqa", {"quantize": "int8", "layout": "stacked"}),
        ("gemma2", {"dtype": "fp32"}),
        ("qwen3", {"gears": True}),
        ("llama_gqa", {"batch": 3, "kv_dtype": "int8", "soc": "Ascend910B4"}),
        ("llama_gqa", {"kv_dtype": "int8:head", "quantize": "int8"}),
    ],
)
def test_weights_and_cache_are_the_bundles_own_to_the_byte(
    exported: Exported, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    source = exported("optimum", family)
    asked = CompileOptions(**{"soc": "Ascend310P3", **SIZES, **options})
    plan = planned(source, asked)
    text = tmp_path / "tokens.npy"
    np.save(text, np.random.default_rng(0).integers(0, 300, (2, 24)))
    given = {"calibration": text} if asked.kv_dtype != "fp16" else {}
    compile_bundle(source, tmp_path / "b", CompileOptions(**{**vars(asked), **given}))
    made = Manifest.load(tmp_path / "b")
    assert plan.weight_bytes == made.quantization.graph_bytes
    assert plan.weight_bytes == held_by_file(tmp_path / "b", made)
    caches = [spec for spec in made.buckets[-1].inputs if "past_key_values" in spec.name]
    arrays = [np.empty(spec.shape, spec.dtype) for spec in caches]
    assert plan.cache_bytes == sum(array.nbytes for array in arrays)
    assert plan.cache_bytes == made.quantization.cache_bytes
    # A bundle plans as its export does, as far as it can be told from it.
    again = planned(tmp_path / "b", CompileOptions(asked.soc))
    assert again == plan


def test_a_ge_graph_writes_its_cache_and_has_no_output_of_it(exported: Exported) -> None:
    source = exported("optimum", "llama_gqa")
    onnx, air = (
        planned(source, CompileOptions("Ascend910B4", front=front, **SIZES))
        for front in ("onnx", "air")
    )
    assert air.cache_bytes == onnx.cache_bytes
    assert air.io_bytes < onnx.io_bytes
    assert air.workspace < onnx.workspace


def test_parts_add_up_and_say_what_they_are(exported: Exported) -> None:
    plan = planned(exported("optimum", "llama_gqa"), CompileOptions("Ascend310P3", **SIZES))
    assert plan.total == sum(plan.parts.values())
    assert set(plan.activations) == {"prefill_s4_c32", "prefill_s8_c32", "decode_c32"}
    assert plan.workspace == plan.activations["prefill_s8_c32"]
    assert [layer.shape for layer in plan.cache] == [(1, 2, 32, 16)] * 4
    assert plan.unshared == 2 * plan.weight_bytes
    assert plan.to_json()["parts"] == plan.parts


def test_gears_need_the_room_of_the_largest_and_share_their_weights(exported: Exported) -> None:
    options = CompileOptions("Ascend310P3", gears=True, **SIZES)
    plan = planned(exported("optimum", "llama_gqa"), options)
    assert set(plan.activations) == {f"gears_c32@{seq}" for seq in (1, 4, 8)}
    assert plan.workspace == plan.activations["gears_c32@8"]
    assert plan.unshared == 0


MEASURE = """
import ctypes, re, sys
import numpy as np
import onnxruntime as ort
from omforge import ir
from omforge.ir.ops import reference_model
from omforge.runtime.session import session_options

ctypes.CDLL(None).mallopt(-3, 1 << 14)  # every tensor is a mapping of its own, given back when freed
options = session_options(1)
options.enable_cpu_mem_arena = False  # which keeps what it once had
model = reference_model(ir.load(sys.argv[1]))
ir.save(model, sys.argv[2], external="twin.data")
session = ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32}
feeds = {i.name: np.zeros(i.shape, kinds[i.type]) for i in session.get_inputs()}


def bytes_of(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])


session.run(None, feeds)
peaks = []
for _ in range(5):
    open("/proc/self/clear_refs", "w").write("5")  # the highest water mark is now
    before = bytes_of("VmRSS")
    outputs = session.run(None, feeds)
    peaks.append(bytes_of("VmHWM") - before)
print(sorted(peaks)[2])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for its peak")
def test_activations_are_within_15_percent_of_the_cpu_backends_peak(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"context": 512, "prefill": (128,), "dtype": "fp32"}
    compile_bundle(EXAMPLE, tmp_path / "b", CompileOptions("Ascend310P3", **sizes))
    made = Manifest.load(tmp_path / "b")
    subject = open_subject(tmp_path / "b", CompileOptions("Ascend310P3"))
    prefill = subject.lower(subject.options)[0].model.graph
    file = tmp_path / "b" / made.buckets[0].file
    run = [sys.executable, "-c", MEASURE, str(file), str(tmp_path / "twin.onnx")]
    done = subprocess.run(run, check=True, text=True, stdout=subprocess.PIPE)
    # ONNX Runtime makes the outputs in the run as well, which have a part of their own in the plan.
    assert peak_bytes(prefill, outputs=True) == pytest.approx(int(done.stdout), rel=0.15)
