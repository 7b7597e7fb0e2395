"""A command of somebody else's bundle compiles its bucket, and does nothing else."""

import pytest

from omforge.atc.command import AtcOptions, atc_command
from omforge.atc.foreign_command import check_foreign
from omforge.ir.errors import InputError
from omforge.lowering.target import target

OURS = atc_command(
    "m.onnx", "om/m", target("Ascend310P3"), {"x": (1,)}, AtcOptions(op_compiler_cache_dir="cache")
)


def test_our_own_commands_pass() -> None:
    check_foreign(OURS, "m.onnx", "om/m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [w.replace("om/m", "../x") for w in c], "its --output is '../x'"),
        (lambda c: [*c, "--output=/tmp/x"], "--output is there twice"),
        (lambda c: [*c, "-output=/tmp/x"], "'-output=/tmp/x' is no --name=value"),
        (lambda c: [*c, "--output", "/tmp/x"], "'--output' is no --name=value"),
        (lambda c: [w.replace("m.onnx", "/etc/x") for w in c], "its --model is '/etc/x'"),
        (lambda c: [w for w in c if "--output" not in w], "its --output is None"),
        (lambda c: [*c, "--mode=1"], "--mode does not belong"),
        (lambda c: [*c, "--json=/home/x/a.json"], "--json does not belong"),
        (lambda c: [*c, "--out_nodes=a:0"], "--out_nodes does not belong"),
        (lambda c: [*c, "--no_flag=1"], "'--no_flag=1' is no --name=value"),
        (lambda c: [*c, "; rm -rf ~"], "is no --name=value"),
        (lambda c: [*c, "--debug_dir=/var/x"], "writes outside of the bundle: --debug_dir=/var/x"),
        (
            lambda c: [*c, "--check_report=../x"],
            "writes outside of the bundle: --check_report=../x",
        ),
        (lambda c: [], "its --model is None"),
    ],
)
def test_what_is_not_ours_is_refused(change, message: str) -> None:
    with pytest.raises(InputError, match="command") as caught:
        check_foreign(change(OURS), "m.onnx", "om/m")
    assert message in str(caught.value)


def test_a_command_that_is_trusted_may_write_elsewhere() -> None:
    check_foreign((*OURS, "--debug_dir=/var/x"), "m.onnx", "om/m", trusted=True)
    with pytest.raises(InputError, match="its --output"):
        check_foreign(OURS, "m.onnx", "om/other", trusted=True)
