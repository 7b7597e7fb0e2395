"""The atc command line, with a stand-in for atc that writes what the real one writes."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from omforge.ir.errors import InputError
from omforge.lowering.atc import (
    AtcOptions,
    atc_command,
    compile_script,
    find_atc,
    run_atc,
)
from omforge.lowering.target import target

T = target("Ascend310P3")
SHAPES = {"input_ids": (1, 1), "attention_mask": (1, 1, 1, 513), "scalar": ()}


def fake_atc(folder: Path, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "atc"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return program


def test_the_command() -> None:
    assert atc_command("decode_c512.onnx", "om/decode_c512", T, SHAPES) == (
        "atc",
        "--framework=5",
        "--model=decode_c512.onnx",
        "--output=om/decode_c512",
        "--soc_version=Ascend310P3",
        "--input_format=ND",
        "--input_shape=input_ids:1,1;attention_mask:1,1,1,513;scalar:",
        "--precision_mode_v2=origin",
        "--external_weight=1",
        "--log=error",
    )


def test_options_are_flags() -> None:
    options = AtcOptions(
        precision_mode_v2="mixed_float16",
        external_weight=0,
        log="null",
        deterministic=True,
        op_compiler_cache_dir="cache",
        fusion_switch_file="fusion.cfg",
    )
    assert atc_command("m.onnx", "m", T, {"x": (1,)}, options)[7:] == (
        "--precision_mode_v2=mixed_float16",
        "--external_weight=0",
        "--log=null",
        "--deterministic=1",
        "--deterministic_level=1",
        "--op_compiler_cache_mode=enable",
        "--op_compiler_cache_dir=cache",
        "--fusion_switch_file=fusion.cfg",
    )


@pytest.mark.parametrize("path", ["a b.onnx", "a+b.onnx", "a@b", "a=b", "a:b", "", "é.onnx"])
def test_paths_that_atc_refuses(path: str) -> None:
    with pytest.raises(InputError, match="atc refuses the path"):
        atc_command(path, "out", T, SHAPES)
    with pytest.raises(InputError, match="atc refuses the path"):
        atc_command("m.onnx", path, T, SHAPES)


def test_paths_that_atc_takes() -> None:
    assert "--model=模型/a-b_c.1.onnx" in atc_command("模型/a-b_c.1.onnx", "out", T, SHAPES)


@pytest.mark.parametrize(
    ("output", "shapes", "message"),
    [
        ("om/", {"x": (1,)}, "no file name"),
        ("o" * 4096, {"x": (1,)}, "4096 characters"),
        ("o", {}, "no inputs"),
        ("o", {"a;b": (1,)}, "cannot be written"),
        ("o", {"x": (1, -1)}, "positive numbers only"),
        ("o", {"x": (0,)}, "positive numbers only"),
    ],
)
def test_what_cannot_be_a_command(
    output: str, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        atc_command("m.onnx", output, T, shapes)


def test_atc_is_found_on_the_path_then_below_cann(tmp_path: Path) -> None:
    on_path = fake_atc(tmp_path / "path", "")
    below = fake_atc(tmp_path / "cann" / "compiler" / "bin", "")
    environment = {"PATH": str(tmp_path / "path"), "ASCEND_HOME_PATH": str(tmp_path / "cann")}
    assert find_atc(environment) == on_path
    assert find_atc({**environment, "PATH": str(tmp_path)}) == below
    assert find_atc({"PATH": "", "ASCEND_TOOLKIT_HOME": str(tmp_path / "cann")}) == below


def test_a_program_that_cannot_be_executed_is_not_atc(tmp_path: Path) -> None:
    fake_atc(tmp_path / "cann" / "bin", "").chmod(0o644)
    found = find_atc({"PATH": "", "ASCEND_HOME_PATH": str(tmp_path / "cann")})
    assert found is None or tmp_path not in found.parents


def test_a_run_that_succeeds(tmp_path: Path) -> None:
    program = fake_atc(
        tmp_path / "bin",
        "echo ATC start working now, please wait for a moment.\n"
        'echo "W11001: Op [n] does not hit the high-priority operator information library"\n'
        "mkdir -p om; touch om/m.om\n"
        "echo ATC run success, welcome to the next use.",
    )
    seen: list[str] = []
    result = run_atc(
        atc_command("m.onnx", "om/m", T, {"x": (1,)}),
        tmp_path,
        tmp_path / "logs" / "m.log",
        program=program,
        on_line=seen.append,
    )
    assert result.ok
    assert result.exit_status == 0
    assert result.om == tmp_path / "om" / "m.om"
    assert list(result.codes) == ["W11001"]
    assert seen[0].startswith("ATC start")
    assert (tmp_path / "logs" / "m.log").read_text().splitlines() == seen


def test_the_om_may_name_the_host(tmp_path: Path) -> None:
    program = fake_atc(tmp_path / "bin", "touch m_linux_aarch64.om; echo ATC run success")
    result = run_atc(("atc", "--output=m"), tmp_path, tmp_path / "log", program=program)
    assert result.om == tmp_path / "m_linux_aarch64.om"


def test_an_old_om_is_not_a_result(tmp_path: Path) -> None:
    (tmp_path / "m.om").touch()
    os.utime(tmp_path / "m.om", (1, 1))
    program = fake_atc(tmp_path / "bin", "echo ATC run success")
    assert run_atc(("atc", "--output=m"), tmp_path, tmp_path / "log", program=program).om is None


@pytest.mark.parametrize(
    ("body", "codes", "status"),
    [
        (
            "echo ATC run failed, Please check the detail log >&2\n"
            'echo "E13010: No operator plugin is registered for Op: n, optype: ai.onnx::16::Foo."\n'
            'echo "E13010: No operator plugin is registered for Op: m, optype: ai.onnx::16::Foo."\n'
            'echo "EZ9999: Inner Error!"\nexit 255',
            ["E13010", "EZ9999"],
            255,
        ),
        ("exit 0", [], 0),  # no word of success
        ("echo ATC run success; exit 3", [], 3),
        ('echo "E18888: Find input index by name failed."; echo ATC run success', ["E18888"], 0),
    ],
)
def test_a_run_that_fails_is_a_result(
    tmp_path: Path, body: str, codes: list[str], status: int
) -> None:
    program = fake_atc(tmp_path / "bin", body)
    result = run_atc(("atc", "--output=m"), tmp_path, tmp_path / "log", program=program)
    assert not result.ok
    assert list(result.codes) == codes
    assert result.exit_status == status
    if codes:
        assert result.codes[codes[0]].startswith(codes[0])


def test_a_folder_that_atc_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "my models"
    folder.mkdir()
    with pytest.raises(InputError, match="my models"):
        run_atc(("atc",), folder, tmp_path / "log", program=Path("/bin/true"))


def test_no_atc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("omforge.lowering.atc._DEFAULT_HOME", str(tmp_path))
    with pytest.raises(InputError, match="atc was not found"):
        run_atc(("atc",), tmp_path, tmp_path / "log")


def test_a_program_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot run"):
        run_atc(("atc",), tmp_path, tmp_path / "log", program=tmp_path / "nothing")


def test_the_script_runs_every_command_in_its_own_folder(tmp_path: Path) -> None:
    program = fake_atc(tmp_path / "bin", 'pwd; for word; do echo "$word"; done')
    bundle = tmp_path / "my bundle"
    bundle.mkdir()
    commands = [atc_command(f"{name}.onnx", f"om/{name}", T, SHAPES) for name in ("a", "b")]
    script = bundle / "compile.sh"
    script.write_text(compile_script(commands))
    done = subprocess.run(
        ["sh", str(script)],
        cwd="/",
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [line for command in commands for line in (str(bundle), *command[1:])]
    assert done.stdout.splitlines() == expected

    chosen = subprocess.run(
        ["sh", str(script)], env={"PATH": os.environ["PATH"], "ATC": str(program)}, check=False
    )
    assert chosen.returncode == 0


def test_the_script_stops_at_the_first_failure(tmp_path: Path) -> None:
    program = fake_atc(tmp_path / "bin", "echo ran; exit 255")
    script = tmp_path / "compile.sh"
    script.write_text(compile_script([("atc", "--a"), ("atc", "--b")]))
    done = subprocess.run(
        ["sh", str(script)],
        env={"PATH": os.environ["PATH"], "ATC": shlex.quote(str(program))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 255
    assert done.stdout == "ran\n"


def test_the_script_quotes_what_a_shell_would_take_apart() -> None:
    """An unquoted ; would end the command and leave a stray word, which atc refuses."""
    text = compile_script([atc_command("m.onnx", "m", T, SHAPES)])
    assert "'--input_shape=input_ids:1,1;attention_mask:1,1,1,513;scalar:'" in text
