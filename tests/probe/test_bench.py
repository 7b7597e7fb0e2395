"""The bench of a bundle: times on the simulated device, bytes from files as msprof writes them."""

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from omforge.ir.errors import InputError
from omforge.probe.bench import REPEATS, BenchOptions, Measured, measure, profiled, total_bytes
from omforge.runtime.bundle import Bundle
from tests.runtime.conftest import tiny_bundle as tiny_bundle
from tests.runtime.tiny import Tiny

Bundles = Callable[[Tiny], Bundle]

A2 = """\ufeffOp Name,Task Duration(us),aic_main_mem_read_bw(GB/s),aic_main_mem_write_bw(GB/s),aiv_main_mem_read_bw(GB/s),aiv_main_mem_write_bw(GB/s)
product,100,500,2.5,N/A,N/A
add,10,N/A,N/A,100,50
"""
OTHER = (
    "Op Name,Task Duration(us),main_mem_read_bw(GB/s),main_mem_write_bw(GB/s)\nproduct,100,50,1\n"
)


def test_a_bundle_is_timed_by_token(tiny_bundle: Bundles) -> None:
    bundle = tiny_bundle(Tiny(om=True))
    found = measure(bundle.folder, BenchOptions("sim", prompt=3, steps=2))
    assert (found.prompt, found.steps, found.batch) == (3, 2, bundle.batches[0])
    assert 0 < found.first_token < 60
    assert found.tokens_per_second == found.batch / found.step
    assert found.to_json()["simulated"] is True
    assert list(found.lines())[-1] == "measured on the simulator: this says nothing of a device"
    with pytest.raises(InputError, match="1000 tokens and 1 steps do not fit"):
        measure(bundle.folder, BenchOptions("sim", prompt=1000, steps=1))


def test_bytes_are_durations_by_bandwidths(tmp_path: Path) -> None:
    assert total_bytes(tmp_path) is None
    below = tmp_path / "PROF_1" / "mindstudio_profiler_output"
    below.mkdir(parents=True)
    (below / "op_summary_1.csv").write_text(A2, encoding="utf-8")
    assert total_bytes(tmp_path) == pytest.approx(100e-6 * 502.5e9 + 10e-6 * 150e9)
    (below / "op_summary_2.csv").write_text(OTHER)
    assert total_bytes(tmp_path) == pytest.approx(51.75e6 + 100e-6 * 51e9)
    (below / "op_summary_3.csv").write_text("Op Name,Task Duration(us)\nproduct,100\n")
    assert total_bytes(tmp_path) == pytest.approx(51.75e6 + 5.1e6)


MSPROF = """#!{python}
import re, sys
output = next(w for w in sys.argv if w.startswith("--output="))[9:]
steps = int(re.search(r"--steps (\\d+)", sys.argv[-1])[1])
with open(output + "/op_summary_1.csv", "w") as file:  # a prefill of 7 MB, and 2 MB a step
    file.write("Task Duration(us),main_mem_read_bw(GB/s)\\n")
    file.write("%d,1\\n" % (7000 + {repeats} * 2000 * steps))
"""


def test_the_bytes_of_a_step_are_what_more_steps_move(tmp_path: Path) -> None:
    program = tmp_path / "msprof"
    program.write_text(MSPROF.format(python=sys.executable, repeats=REPEATS))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    found = Measured("acl", 1, 8, 16, 0.01, 0.002)
    assert profiled(tmp_path, str(program), found) == (pytest.approx(2e6), "")
    program.write_text("#!/bin/sh\nexit 3\n")
    assert profiled(tmp_path, str(program), found) == (
        None,
        "msprof ended with 3 and wrote no bandwidths",
    )
    assert profiled(tmp_path, str(program), Measured("acl", 1, 8, 1, 1, 1))[0] is None
    told = Measured("acl", 1, 8, 16, 0.01, 0.002, 2e6)
    assert told.to_json()["gigabytes_per_second"] == pytest.approx(1.0)
    assert "bytes        2.0 MB a step, 1.0 GB/s (msprof)" in list(told.lines())
    json.dumps(told.to_json())
