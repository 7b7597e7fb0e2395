"""The same suite on every backend: the same tokens, in fact the same logits.

`cpu` is the reference; `sim` is the pyACL backend on the simulated device, in strict mode, so that
every misuse and every leak fails the test that made it; `acl` needs an NPU, and .om files that atc
compiled, which the tests' bundles do not have: it is skipped, and says why.

The bundles of the front onnx are written by hand; those of the front air are compiled from the
export of the same model, one for each batch, and built by the simulated atc; and so are those for
the CPU, whose graph is bound to the cache.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omforge.atc.build import BuildOptions, build_bundle
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir.errors import CheckError, InputError
from omforge.runtime.acl_device import import_acl
from omforge.runtime.acl_session import AclBackend
from omforge.runtime.acl_sim import simulated_acl
from omforge.runtime.bundle import Bundle
from omforge.runtime.cpu_session import CpuBackend, runs_in_place
from omforge.runtime.generate import LanguageModel
from omforge.runtime.sampling import Sampling
from tests.runtime.tiny import VOCABULARY, Tiny, exported_graph, reference_logits

Open = Callable[..., contextlib.AbstractContextManager[LanguageModel]]
OfBatch = Callable[[int], Bundle]

AIR = CompileOptions("Ascend910B4", context=24, prefill=(4, 8), dtype="fp32", front="air")
VARIANTS: dict[str, Tiny | tuple[CompileOptions, tuple[int | None, int | None]]] = {
    "stacked": Tiny(batches=(1, 4), om=True),
    "per-layer": Tiny(batches=(1, 4), layout="per-layer", om=True),
    "half": Tiny(batches=(1, 4), layout="per-layer", dtype="float16", om=True),
    "windows": Tiny(batches=(1, 4), windows=(None, 6), om=True),
    "gears": Tiny(batches=(1, 4), gears=True, om=True),
    "gears, per-layer, windows": Tiny(
        batches=(1, 4), windows=(None, 6), gears=True, layout="per-layer", om=True
    ),
    "air, 310B, half": (replace(AIR, soc="Ascend310B4", dtype="fp16"), (None, None)),
    "air, gears": (replace(AIR, gears=True), (None, 6)),
    "air, gears, stacked": (replace(AIR, gears=True, layout="stacked"), (None, None)),
    "for the cpu": (CompileOptions("cpu", context=24, dtype="fp32"), (None, 6)),
}
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]


@pytest.fixture(params=["cpu", "sim", "acl"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "acl":
        try:
            import_acl()
        except InputError as error:
            pytest.skip(str(error))
        pytest.skip("the tests' bundles have simulated .om files, which no device loads")
    return request.param


@pytest.fixture
def opened(backend: str) -> Open:
    """`opened(bundle)` is a model on the backend; at its end nothing may be left on the device."""

    @contextlib.contextmanager
    def open_model(bundle: Bundle, batch: int = 1) -> Iterator[LanguageModel]:
        if backend == "cpu":
            bound = CpuBackend(bundle, batch) if runs_in_place(bundle) else None
            with LanguageModel(bundle, batch=batch, backend=bound) as model:
                yield model
            return
        if bundle.manifest.front == "ort":
            pytest.skip("no .om is made of a graph for the CPU")
        acl = simulated_acl(strict=True)
        with LanguageModel(
            bundle, batch=batch, backend=AclBackend(bundle, batch, acl=acl)
        ) as model:
            yield model
        assert acl.sim.finalised
        assert acl.sim.leaks == []

    return open_model


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Bundle]:
    """`compiled(variant, batch)` is the bundle of the tiny model's export, built for the device."""
    made: dict[tuple[str, int], Bundle] = {}

    def bundle(variant: str, batch: int) -> Bundle:
        if (variant, batch) not in made:
            options, layer_windows = VARIANTS[variant]
            folder: Path = tmp_path_factory.mktemp("air")
            (folder / "export.onnx").write_bytes(exported_graph(layer_windows).SerializeToString())
            compile_bundle(folder / "export.onnx", folder / "b", replace(options, batch=batch))
            if options.soc != "cpu":
                build_bundle(folder / "b", BuildOptions(atc="sim", cache=None))
            made[variant, batch] = Bundle.open(folder / "b", verify_hashes=True)
        return made[variant, batch]

    return bundle


@pytest.fixture(params=VARIANTS)
def of_batch(
    request: pytest.FixtureRequest,
    tiny_bundle: Callable[[Tiny], Bundle],
    compiled: Callable[[str, int], Bundle],
) -> OfBatch:
    """`of_batch(rows)` is the variant's bundle with buckets of that batch."""
    variant: str = request.param
    tiny = VARIANTS[variant]
    if isinstance(tiny, Tiny):
        return lambda rows: tiny_bundle(tiny)
    return lambda rows: compiled(variant, rows)


@pytest.fixture
def bundle(of_batch: OfBatch) -> Bundle:
    return of_batch(1)


def windows(bundle: Bundle) -> tuple[int | None, ...]:
    """Of both layers: the masks' order says nothing."""
    narrow = any(mask.window == 6 for mask in bundle.manifest.masks)
    return (None, 6) if narrow else (None, None)


def tolerance(bundle: Bundle) -> float:
    return 0.06 if bundle.manifest.dtype == "float16" else 2e-5


def test_prefill_in_chunks_then_decode(opened: Open, bundle: Bundle) -> None:
    """13 tokens are chunks of 8, 4 and 1; the answer is that of the whole text at once."""
    expected = reference_logits(TEXT, windows(bundle))
    with opened(bundle) as model:
        found = [model.prefill([TEXT[:13]])[0], model.decode(TEXT[13:])[0]]
        np.testing.assert_allclose(found, expected[12:], atol=tolerance(bundle))
        assert model.length == 14


def test_four_rows_of_different_lengths(opened: Open, of_batch: OfBatch) -> None:
    """Shorter rows are padded on the left, and the padding is never seen."""
    bundle = of_batch(4)
    prompts = [TEXT[:3], TEXT[:9], TEXT[2:3], TEXT[4:11]]
    with opened(bundle, 4) as model:
        logits = model.prefill(prompts)
        following = model.decode([7, 8, 9, 10])
        for row, prompt in enumerate(prompts):
            expected = reference_logits([*prompt, 7 + row], windows(bundle))
            pair = [logits[row], following[row]]
            np.testing.assert_allclose(pair, expected[-2:], atol=tolerance(bundle))


def test_fewer_prompts_than_rows(opened: Open, of_batch: OfBatch) -> None:
    with opened(of_batch(4), 4) as model:
        assert model.prefill([TEXT[:5], TEXT[:2]]).shape == (2, VOCABULARY)
        assert model.decode([1, 2]).shape == (2, VOCABULARY)


def test_a_second_text_remembers_nothing_of_the_first(opened: Open, bundle: Bundle) -> None:
    with opened(bundle) as model:
        fresh = model.prefill([TEXT[:6]])
        model.prefill([list(reversed(TEXT))])
        model.decode([1])
        np.testing.assert_array_equal(model.prefill([TEXT[:6]]), fresh)


def test_the_context_fills_up(opened: Open, bundle: Bundle) -> None:
    with opened(bundle) as model:
        model.prefill([TEXT[:12]])
        for token in range(12):
            model.decode([token])
        assert model.length == model.context == 24
        with pytest.raises(CheckError, match="the context is full"):
            model.decode([1])


def test_all_backends_say_the_same(backend: str, opened: Open, bundle: Bundle) -> None:
    """Bit for bit, as they run the same graph with what must be the same inputs."""
    if backend == "cpu":
        pytest.skip("it is what the others are compared with")

    def told(model: LanguageModel) -> list[Any]:
        generation = model.generate(TEXT[:11], sampling=Sampling(temperature=1.5, seed=3))
        return [list(islice(generation, 9)), model.prefill([TEXT]).tolist()]

    with LanguageModel(bundle, batch=1) as reference, opened(bundle) as model:
        assert told(model) == told(reference)


def test_an_interrupted_generation_leaves_nothing_behind(opened: Open, bundle: Bundle) -> None:
    def interrupted() -> None:
        with opened(bundle) as model:
            model.prefill([TEXT[:4]])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
