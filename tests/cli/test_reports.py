"""What commands tell: events, a line for each kind, and what comes next."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omforge import ir
from omforge.bundle.manifest import FixedInput
from omforge.cli.app import app
from omforge.cli.reports import next_commands
from omforge.runtime.bundle import Bundle

ADAPTER = FixedInput("lora", "float16", (4, 8), "adapter")
MASK = FixedInput("encoder_attention_mask", "int64", ("batch", 16), "memory")
STATES = FixedInput("encoder_hidden_states", "float16", ("batch", 16, 64), "memory")


@pytest.mark.parametrize(
    ("fixed", "give"),
    [((), ""), ((ADAPTER, MASK), ""), ((ADAPTER, MASK, STATES), " --give FILE.npz")],
    ids=["nothing", "what may be absent", "states"],
)
def test_the_next_command_has_what_run_needs(
    bert: Bundle, fixed: tuple[FixedInput, ...], give: str
) -> None:
    made = dataclasses.replace(bert.manifest, fixed=fixed)
    told = next_commands(made, Path("my bundle"))
    assert told == f"omforge verify 'my bundle'; omforge run 'my bundle' --prompt \"...\"{give}"


def test_equal_events_are_one_line_and_all_of_them_with_verbose(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = " ".join(f"a{n} = com.acme.Fast (a{n - 1})" for n in range(1, 5))
    text = (
        '<ir_version: 11, opset_import: ["" : 24, "com.acme" : 1]>\n'
        f"g (float[N] a0) => (float[N] y) {{ {nodes} y = Identity (a4) }}"
    )
    file = tmp_path / "model.onnx"
    ir.save(ir.from_onnx_text(text), file)
    words = ["opt", str(file), "-p", "raise-contrib-ops", "-o", str(tmp_path / "out.onnx")]
    result = CliRunner().invoke(app, words)
    left = [line for line in result.stdout.splitlines() if "alone" in line]
    why = "operators of domain com.acme are not known"
    assert left == [f"raise-contrib-ops: left com.acme.Fast -> a1 alone: {why} (and 3 more)"]
    assert not caplog.messages
    CliRunner().invoke(app, [*words, "-v"])
    assert [line for line in caplog.messages if "alone" in line] == [
        f"raise-contrib-ops: left com.acme.Fast -> a{n} alone: {why}" for n in range(1, 5)
    ]
