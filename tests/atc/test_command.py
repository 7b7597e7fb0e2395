"""The atc command line: typed options in, words that atc takes out; and the script."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from omforge.atc.command import (
    AtcOptions,
    CompressWeights,
    MixedPrecision,
    PrecisionMode,
    atc_command,
    compile_script,
)
from omforge.atc.sim.main import run
from omforge.ir.errors import InputError
from omforge.lowering.target import target
from tests.atc.sim.models import save

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
        precision=MixedPrecision("mixed_float16", modify_mixlist="mix.json"),
        external_weight=0,
        log="null",
        deterministic=2,
        op_compiler_cache_dir="cache",
        fusion_switch_file="fusion.cfg",
        compress_weights=CompressWeights("compress.cfg"),
    )
    assert atc_command("m.onnx", "m", T, {"x": (1,)}, options)[7:] == (
        "--precision_mode_v2=mixed_float16",
        "--modify_mixlist=mix.json",
        "--external_weight=0",
        "--log=null",
        "--deterministic=1",
        "--deterministic_level=2",
        "--op_compiler_cache_mode=enable",
        "--op_compiler_cache_dir=cache",
        "--fusion_switch_file=fusion.cfg",
        "--compress_weight_conf=compress.cfg",
    )
    older = AtcOptions(precision=PrecisionMode("force_fp32"), compress_weights=CompressWeights())
    assert older.words() == (
        "--precision_mode=force_fp32",
        "--external_weight=1",
        "--log=error",
        "--enable_compress_weight=true",
    )


@pytest.mark.parametrize("name", ["quant_type", "precision_mode", "enable_fusion", "mem_limit"])
def test_flags_that_atc_does_not_have_cannot_be_written(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        AtcOptions(**{name: "x"})  # pyright: ignore[reportArgumentType]


def test_the_users_flags_replace_ours() -> None:
    options = AtcOptions(extra=("--log", "info", "-precision-mode=allow_mix_precision"))
    assert options.words() == (
        "--external_weight=1",
        "--log=info",
        "--precision_mode=allow_mix_precision",
    )
    with pytest.raises(InputError, match="atc does not take --quant_type"):
        AtcOptions(extra=("--quant_type=INT8",)).words()


@pytest.mark.parametrize(
    "options",
    [
        AtcOptions(),
        AtcOptions(precision=PrecisionMode("must_keep_origin_dtype"), deterministic=3),
        AtcOptions(precision=MixedPrecision("mixed_bfloat16"), external_weight=2, log="debug"),
        AtcOptions(compress_weights=CompressWeights(), op_compiler_cache_dir="kernels"),
        AtcOptions(
            extra=("--buffer_optimize=off_optimize", "--jit_compile=0", "--host-env-os=linux")
        ),
    ],
)
def test_what_can_be_written_is_a_command_that_atc_takes(
    options: AtcOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked by the simulation, which knows nothing of these types."""
    monkeypatch.chdir(tmp_path)
    save("(int32[1,1] x) => (int32[1,1] y) { y = Identity (x) }", tmp_path)
    command = atc_command("model.onnx", "out/m", T, {"x": (1, 1)}, options)
    result = run(command[1:])
    assert result.exit_status == 0, result.text


def test_gears_are_dynamic_dims() -> None:
    shapes = {"ids": (1, -1), "mask": (1, 1, -1, -1)}
    command = atc_command("m.onnx", "m", T, shapes, gears=[(1, 1, 33), (8, 8, 40)])
    assert command[6:8] == (
        "--input_shape=ids:1,-1;mask:1,1,-1,-1",
        "--dynamic_dims=1,1,33;8,8,40",
    )


@pytest.mark.parametrize(
    "gears", [[(1, 1, 1)], [(1, 1, 1), (1, 1, 1)], [(1, 1), (2, 2)], [(0, 1, 1), (2, 2, 2)]]
)
def test_gears_that_atc_refuses(gears: list[tuple[int, ...]]) -> None:
    shapes = {"ids": (1, -1), "mask": (1, 1, -1, -1)}
    with pytest.raises(InputError, match="cannot be compiled"):
        atc_command("m.onnx", "m", T, shapes, gears=gears)


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
