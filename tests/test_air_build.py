"""A bundle of the front air, from the export to tokens on the simulated device."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omforge.air.files import read_air, write_air
from omforge.atc.build import BuildOptions, build_bundle
from omforge.bundle.manifest import Manifest
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir.digests import sha256
from omforge.ir.errors import CheckError
from omforge.om import read_om
from omforge.runtime.acl_session import AclBackend
from omforge.runtime.acl_sim import simulated_acl
from omforge.runtime.bundle import Bundle
from omforge.runtime.generate import LanguageModel
from omforge.runtime.om_files import check_om

Exported = Callable[[str, str], Path]

SMALL = CompileOptions("Ascend310P3", context=32, prefill=(8,), batch=2, front="air")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1, 8]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 300, (4, 20)))
    return path


def logits(model: LanguageModel) -> np.ndarray:
    """Of a prompt in two chunks, then of two steps."""
    return np.stack([model.prefill(PROMPTS), model.decode([7, 8]), model.decode([9, 10])])


def on_both(bundle: Bundle) -> tuple[np.ndarray, np.ndarray, int]:
    """What the CPU and the device say, and the bytes that a step copied within the device."""
    with LanguageModel(bundle) as model:
        on_cpu = logits(model)
    acl = simulated_acl(strict=True)
    with LanguageModel(bundle, backend=AclBackend(bundle, 2, acl=acl)) as model:
        before = acl.sim.moved["D2D"]  # opening tries what the device can copy
        on_device = logits(model)
        moved = acl.sim.moved["D2D"] - before
    assert acl.sim.leaks == []
    return on_cpu, on_device, moved


@pytest.mark.parametrize(
    ("soc", "quantize", "kv_dtype"),
    [
        ("Ascend310P3", "int8", "int8"),
        ("Ascend910B4", "int4", "fp16"),
        ("Ascend310P3", "w8a8", "fp16"),
    ],
)
def test_quantised_bundles_run_on_the_device(
    exported: Exported, tmp_path: Path, text: Path, soc: str, quantize: str, kv_dtype: str
) -> None:
    options = dataclasses.replace(
        SMALL, soc=soc, quantize=quantize, kv_dtype=kv_dtype, calibration=text
    )
    compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    build_bundle(tmp_path / "b", BuildOptions(atc="sim", cache=None))
    bundle = Bundle.open(tmp_path / "b", verify_hashes=True)
    assert bundle.manifest.kv.in_place
    assert len(check_om(bundle).fit) == len(bundle.manifest.buckets)
    on_cpu, on_device, moved = on_both(bundle)
    np.testing.assert_array_equal(on_cpu, on_device)
    assert moved == 0  # the graph writes the cache, and nobody copies it


def test_build_run_and_a_second_build_from_the_cache(exported: Exported, tmp_path: Path) -> None:
    """What was made is made again where the graph or the weights are others."""
    folder, kept = tmp_path / "b", tmp_path / "kept"
    compile_bundle(exported("optimum", "llama_gqa"), folder, SMALL)

    def built() -> None:
        build_bundle(folder, BuildOptions(atc="sim", cache=kept))

    built()
    assert len(list((kept / "entries").iterdir())) == 2
    decode = read_om(folder / "om" / "decode_c32_b2.om")
    assert [t.name for t in decode.models[0].inputs][-1] == "past_key_values.1.value"
    first = (folder / "om" / "decode_c32_b2.om").read_bytes()
    for file in (folder / "om").iterdir():
        if file.is_file():
            file.unlink()
    built()
    assert len(list((kept / "entries").iterdir())) == 2
    assert (folder / "om" / "decode_c32_b2.om").read_bytes() == first
    on_cpu, on_device, _ = on_both(Bundle.open(folder, verify_hashes=True))
    np.testing.assert_array_equal(on_cpu, on_device)
    weights = folder / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    manifest = Manifest.load(folder)
    hashes = {**manifest.files, "weights.bin": sha256(weights)}
    dataclasses.replace(manifest, files=hashes).save(folder)
    built()
    assert len(list((kept / "entries").iterdir())) == 4


def test_a_graph_that_the_simulated_atc_refuses(exported: Exported, tmp_path: Path) -> None:
    """Its words reach the user, and the bundle stays as it was."""
    folder = tmp_path / "b"
    compile_bundle(exported("optimum", "llama_gqa"), folder, SMALL)
    manifest = Manifest.load(folder)
    file = manifest.buckets[0].file
    air = read_air(folder / file)
    (graph,) = air.graphs
    ops = [
        dataclasses.replace(op, type="Castle") if op.type == "RmsNorm" else op for op in graph.ops
    ]
    changed = dataclasses.replace(graph, ops=tuple(ops))
    write_air(dataclasses.replace(air, graphs=(changed,)), folder / file)
    hashes = {**manifest.files, file: sha256(folder / file)}
    dataclasses.replace(manifest, files=hashes).save(folder)
    with pytest.raises(CheckError, match=rf"atc does not compile {file}: .*EZ3003"):
        build_bundle(folder, BuildOptions(atc="sim", cache=None))
