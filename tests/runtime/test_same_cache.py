"""The canonical graph on the integers of a lowered run."""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir.errors import CheckError
from omforge.runtime.bundle import Bundle
from omforge.runtime.same_cache import Follower, Recorder, Tips, Written

PROMPTS = (tuple(range(3, 26)), tuple(range(40, 47)))  # in chunks of 16, 4 and 4; padded
DECODED = np.array([5, 9])


@pytest.fixture(scope="module", params=["stacked", "per-layer", "in place"])
def bundle(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    exported: Callable[[str, str], Path],
) -> Bundle:
    folder = tmp_path_factory.mktemp("same")
    in_place = request.param == "in place"
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(3, 300, (24, 40)))
    options = CompileOptions(
        "Ascend910B4",
        context=48,
        prefill=(4, 16),
        batch=2,
        layout="auto" if in_place else request.param,
        front="air" if in_place else "onnx",
        kv_dtype="int8",
        calibration=folder / "tokens.npy",
    )
    compile_bundle(exported("optimum", "llama_gqa"), folder / "b", options)
    return Bundle.open(folder / "b")


def logits(model: Recorder | Follower) -> np.ndarray:
    found = np.stack([model.prefill(PROMPTS), model.decode(DECODED)])
    model.close()
    return found


def test_it_reads_the_integers_that_the_lowered_graphs_wrote(bundle: Bundle) -> None:
    written = Written()
    lowered = logits(Recorder(bundle, 2, written))
    ((prompts, chunks),) = written.runs
    assert prompts == PROMPTS
    assert [next(iter(chunk.values())).shape[2] for chunk in chunks] == [16, 4, 3, 1]
    assert {array.dtype.name for chunk in chunks for array in chunk.values()} == {"int8"}
    found = logits(Follower(bundle, 2, written))
    np.testing.assert_allclose(found, lowered, rtol=2e-2, atol=5e-2)
    assert written.tips[PROMPTS].share < 0.1
    assert written.tips[PROMPTS].most <= 1
    assert not written.runs
    for chunk in chunks[:-1]:
        for array in chunk.values():
            array[:] //= 4
    written.runs.append((prompts, chunks))
    assert np.abs(logits(Follower(bundle, 2, written))[1] - lowered[1]).max() > 0.1


def test_it_counts_the_integers_that_it_would_not_have_written(bundle: Bundle) -> None:
    written = Written()
    logits(Recorder(bundle, 2, written))
    run = written.runs[0]

    def tips() -> Tips:
        written.runs = deque([run])
        logits(Follower(bundle, 2, written))
        return written.tips[PROMPTS]

    tipped = tips()
    *_, (name, first) = run[1][0].items()  # a graph that writes its cache reads it ahead of others
    first[1, :, :16] = 99  # padding: the second row's tokens begin behind it
    assert tips() == tipped
    last = run[1][-1][name]  # one token of 24
    last[0] = np.where(last[0] > 0, last[0] - 50, last[0] + 50)
    found = tips()
    assert 50 <= found.most <= 51
    assert found.where == f"{name}, row 0"
    assert found.mean == pytest.approx(50 / 24, abs=0.1)
    assert found.share > tipped.share


def test_another_run_is_refused(bundle: Bundle) -> None:
    written = Written()
    logits(Recorder(bundle, 2, written))
    prompts, chunks = written.runs[0]
    with pytest.raises(CheckError, match="other prompts"):
        Follower(bundle, 2, written).prefill([row[:-1] for row in PROMPTS])
    written.runs = deque([(prompts, chunks[1:])])
    follower = Follower(bundle, 2, written)
    with pytest.raises(CheckError, match=r"other chunks .* writes \[.*16.*\], they wrote \[.*4"):
        follower.prefill(PROMPTS)
