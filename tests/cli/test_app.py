"""The command line: what each command prints and returns, and one clear error for each mistake."""

import dataclasses
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

import omforge
from omforge import ir
from omforge.bundle.manifest import Manifest
from omforge.cli import app as cli
from omforge.compilation import writing
from omforge.ir.digests import sha256
from omforge.om.simulated import simulate_om
from omforge.passes import PASSES, PIPELINES
from omforge.runtime import text_stream
from omforge.testing import parse
from tests.runtime.tiny import compile_om

Exports = Callable[[str, str], Path]
SOC = "Ascend310P3"
SIZES = ("--context", "32", "--prefill", "8")
RELU = """<ir_version: 10, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y) { h = Identity (x) y = Relu (h) }"""
WITHOUT_CACHE = """<ir_version: 10, opset_import: ["" : 17]>
g (int64[batch, seq] input_ids) => (float[batch, seq, 8] logits) {
    h = Gather (table, input_ids)
    logits = MatMul (h, head)
}"""


class Result:
    """Status and both streams of one command."""

    def __init__(self, *arguments: object) -> None:
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        self.status = done.exit_code
        self.out = done.stdout
        self.err = done.stderr
        assert "a fault of omforge" not in self.err, self.err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def omf(*arguments: object) -> Result:
    """Run a command that must succeed."""
    result = Result(*arguments)
    assert result.status == 0, result.out + result.err
    return result


def refused(*arguments: object, status: int = 2) -> str:
    """Run a command that must fail with one message; the message in one line."""
    result = Result(*arguments)
    assert result.status == status, result.out + result.err
    assert result.err.startswith("error: ")
    assert result.out == ""
    assert "Traceback" not in result.err
    return " ".join(result.err.split())


@pytest.fixture(scope="session")
def bundle(exported: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle; read-only."""
    folder = tmp_path_factory.mktemp("cli") / "bundle"
    omf("compile", exported("optimum", "llama_gqa").parent, "--target", SOC, "-o", folder, *SIZES)
    return folder


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    """A model that is no language model."""
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.parser.parse_model(RELU), path)
    return path


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """A folder in which a command that fails must leave nothing."""
    folder = tmp_path / "empty"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


# --- the program --------------------------------------------------------------------------------


def test_version() -> None:
    assert omf("--version").out == f"omforge {omforge.__version__}\n"


def test_help_lists_the_commands_and_loads_no_room() -> None:
    slow = ("numpy", "onnx", "onnx_ir", "onnxruntime", "transformers", "rich")
    code = (
        "import sys\nfrom omforge.cli.app import main\nsys.argv = ['omforge', '--help']\n"
        f"try: main()\nexcept SystemExit: print([n for n in {slow} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("compile", "run", "opt", "check", "verify", "passes"):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("arguments", [["compile"], ["fly"], ["opt", "x.onnx"], ["run", "b"]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert Result(*arguments).status == 2


# --- compile ------------------------------------------------------------------------------------


def test_compile_tells_what_it_did(exported: Exports, tmp_path: Path) -> None:
    source = exported("optimum", "llama_gqa").parent
    out = omf("compile", source, "--target", SOC, "-o", tmp_path / "b", *SIZES).out
    lines = out.splitlines()
    assert lines[0].split() == ["pass", "rewrites", "nodes", "seconds"]
    assert any(line.split()[:2] == ["fuse-rms-norm", "5"] for line in lines)
    assert "nodes      exported 621 -> raised " in out
    assert "coverage   attention 2 of 2, rotary 4 of 4, norm 5 of 5, mlp 2 of 2" in out
    assert f"legality   {SOC}: 0 illegal of " in out
    assert "float16, context 32, batch 1, per-layer cache" in out
    assert "compile.sh" in out
    assert f"next       omforge verify {tmp_path / 'b'}" in out
    assert "\x1b" not in out  # a pipe gets no colours


@pytest.mark.parametrize("route", ["optimum", "dynamo"])
def test_compare_each_runs_the_model_around_each_pass(
    exported: Exports, tmp_path: Path, route: str
) -> None:
    source = exported(route, "mistral").parent
    out = omf(
        "compile", source, "--target", SOC, "-o", tmp_path / "b", *SIZES, "--compare-each"
    ).out
    rows = {line.split()[0].partition("{")[0]: line for line in out.splitlines() if "->" in line}
    assert 0 < float(rows["fuse-attention"].split()[-1]) < 1e-4
    assert rows["fuse-kv-io"].endswith("new interface")
    assert rows["inline-functions"].endswith(" -")


def test_compare_each_says_when_a_model_is_too_large(
    exported: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omforge.recognition.feeds.COMPARE_LIMIT", 1 << 16)
    source = exported("dynamo", "llama_mha").parent
    given = ("compile", source, "--target", SOC, "-o", tmp_path / "b", *SIZES, "--compare-each")
    out = omf(*given).out
    assert "not compared: 0 MiB of weights are above the limit" in out
    assert omf(*given, "--json").json["remark"].startswith("not compared")


def test_compile_json(exported: Exports, tmp_path: Path) -> None:
    source = exported("hfexporter", "qwen2")
    told = omf(
        *("compile", source, "--target", "Ascend910B4", "-o", tmp_path / "b", "--json"),
        *("--context", 64, "--prefill", "8,16", "--batch", 2, "--dtype", "fp32"),
        *("--layout", "per-layer"),
    ).json
    assert told["target"] == "Ascend910B4"
    assert (told["dtype"], told["context"], told["batch"]) == ("float32", 64, 2)
    assert told["layout"] == "per-layer"
    assert told["coverage"]["complete"] is True
    assert told["coverage"]["attention"] == {"found": 2, "expected": 2, "missed": []}
    assert [bucket["illegal"] for bucket in told["buckets"]] == [0, 0, 0]
    for bucket in told["buckets"]:
        assert bucket["command"][0] == "atc"
        assert (tmp_path / "b" / bucket["file"]).is_file()
    assert told["nodes"]["exported"] == 210
    assert {step["pass"] for step in told["passes"]} >= {"fuse-attention", "fold-constants"}


def test_two_compiles_write_the_same_bytes(exported: Exports, tmp_path: Path) -> None:
    source = exported("dynamo", "llama_gqa").parent
    for name, more in (("a", ()), ("b", ("--compare-each",))):
        omf("compile", source, "--target", SOC, "-o", tmp_path / name, *SIZES, *more)
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "ab"
    )
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []
    assert {"manifest.json", "weights.bin", "canonical.onnx"} <= set(first)


def test_a_bundle_is_replaced(exported: Exports, tmp_path: Path) -> None:
    source = exported("dynamo", "llama_mha").parent
    for context in ("16", "24"):
        omf(
            *("compile", source, "--target", SOC, "-o", tmp_path / "b"),
            *("--context", context, "--prefill", "8"),
        )
    assert sorted(f.name for f in (tmp_path / "b").glob("decode*.onnx")) == ["decode_c24.onnx"]
    assert [f.name for f in tmp_path.iterdir()] == ["b"]


def test_compile_refuses_a_source_that_is_not_there(empty: Path) -> None:
    said = refused("compile", "nowhere", "--target", SOC, "-o", empty / "b")
    assert "nowhere does not exist" in said


def test_compile_refuses_a_folder_without_a_model(empty: Path) -> None:
    said = refused("compile", empty, "--target", SOC, "-o", empty / "b")
    assert "holds no .onnx file" in said


def test_compile_refuses_a_truncated_file(exported: Exports, tmp_path: Path, empty: Path) -> None:
    whole = exported("optimum", "llama_gqa").read_bytes()
    file = tmp_path / "model.onnx"
    file.write_bytes(whole[: len(whole) // 2])
    said = refused("compile", file, "--target", SOC, "-o", empty / "b")
    assert f"{file} is truncated or corrupt" in said
    assert "Copy or export the model again" in said


def test_compile_refuses_missing_external_data(
    exported: Exports, tmp_path: Path, empty: Path
) -> None:
    model = onnx.load(exported("optimum", "llama_gqa"))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights")
    (tmp_path / "weights").unlink()
    said = refused("compile", tmp_path / "model.onnx", "--target", SOC, "-o", empty / "b")
    assert f"{tmp_path / 'weights'} does not exist; it holds" in said


def test_compile_refuses_an_unknown_soc(exported: Exports, empty: Path) -> None:
    source = exported("optimum", "llama_gqa")
    said = refused("compile", source, "--target", "Ascend310P33", "-o", empty / "b")
    assert "'Ascend310P33' is not known" in said
    assert "Did you mean Ascend310P" in said


def test_compile_refuses_a_graph_that_is_no_causal_lm(relu: Path, empty: Path) -> None:
    said = refused("compile", relu, "--target", SOC, "-o", empty / "b")
    assert "no causal LM" in said
    assert "inputs: x" in said


def test_compile_refuses_a_model_without_a_cache(tmp_path: Path, empty: Path) -> None:
    model = onnx.parser.parse_model(WITHOUT_CACHE)
    for name, shape in (("table", (8, 4)), ("head", (4, 8))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    onnx.save(model, tmp_path / "model.onnx")
    said = refused("compile", tmp_path / "model.onnx", "--target", SOC, "-o", empty / "b")
    assert "the model has no KV cache" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--context", "100000"), "config.json says max_position_embeddings = 256"),
        (("--context", "16", "--prefill", "17"), "a prefill bucket of 17 tokens"),
        (("--prefill", "8,x"), "--prefill 8,x: it is no list of numbers"),
    ],
    ids=["context", "prefill", "list"],
)
def test_compile_refuses_sizes_that_make_no_sense(
    exported: Exports, empty: Path, arguments: tuple[str, ...], words: str
) -> None:
    source = exported("optimum", "llama_gqa")
    said = refused("compile", source, "--target", SOC, "-o", empty / "b", *arguments)
    assert words in said.replace(" why:", ":")


def test_compile_refuses_a_folder_with_other_files(exported: Exports, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    source = exported("optimum", "llama_gqa")
    said = refused("compile", source, "--target", SOC, "-o", tmp_path)
    assert "holds other files" in said
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_errors_are_json_too(empty: Path) -> None:
    result = Result("compile", "nowhere", "--target", SOC, "-o", empty / "b", "--json")
    assert result.status == 2
    assert result.json["error"]["what"] == "nowhere does not exist"
    assert result.json["error"]["exit_status"] == 2
    assert result.err.startswith("error: nowhere does not exist")


@pytest.mark.parametrize("command", ["compile", "explain"])
def test_an_operator_that_onnx_has_not_is_named_on_reading(empty: Path, command: str) -> None:
    model = parse("""<ir_version: 10, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 4] y) { h = Sigmiod (x) y = Relu (h) }""")
    file = empty.with_name("m.onnx")
    ir.save(model, file)
    more = ("--target", SOC, "-o", empty / "b") if command == "compile" else ()
    said = refused(command, file, *more, status=2)
    assert "m.onnx has operators that ONNX does not know" in said
    assert "operator Sigmiod is unknown" in said
    assert "Did you mean Sigmoid?" in said


def test_compile_takes_the_flags_of_opt(exported: Exports, tmp_path: Path) -> None:
    """Passes are numbered through all stages, and --json stays JSON alone."""
    source = exported("optimum", "llama_gqa")
    words = ("compile", source, "--target", SOC, "-o", tmp_path / "b", *SIZES)
    done = Result(*words, "--print-after", "fuse-swish,tabulate-rotary", "--time", "--json")
    assert done.status == 0
    assert done.json["target"] == SOC
    printed = re.findall(r"// after (\d+), (\S+): \d+ rewrites", done.err)
    assert [name.partition("{")[0] for _, name in printed] == ["fuse-swish", "tabulate-rotary"]
    first, last = (int(number) for number, _ in printed)
    assert last > first + 10
    assert "s  total" in Result(*words, "--time").out
    said = refused(*words, "--print-after", "fuse-swich", status=2)
    assert "Did you mean fuse-swish?" in said


def test_compile_bisects_by_rewrites_and_keeps_a_reproducer(
    exported: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported("optimum", "llama_gqa")
    words = ("compile", source, "--target", SOC, "-o", tmp_path / "b", *SIZES)
    said = refused(*words, "--bisect-rewrites", 3, status=1)
    assert "coverage is not complete" in said

    def fails(self: object, model: ir.Model) -> int:
        raise ir.CheckError("this pass fails", "always", "")

    monkeypatch.setattr(PASSES["fuse-swish"], "run", fails)
    said = refused(*words, "--reproducer", tmp_path / "kept", status=1)
    command = re.search(r"reproduce: omforge (opt \S+ -p \S+)", said)
    assert command is not None
    assert refused(*shlex.split(command.group(1)), status=1).startswith("error: this pass fails")


def test_ctrl_c_leaves_nothing_behind(
    exported: Exports, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        assert list(empty.iterdir()), "the bundle is being written by now"
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "compile_script", interrupt)
    source = exported("optimum", "llama_gqa")
    said = refused("compile", source, "--target", SOC, "-o", empty / "b", *SIZES, status=130)
    assert said == "error: interrupted: what was complete stays, and nothing half-written"


def limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the program where no file may grow beyond 40,000 bytes, as on a disk that is full."""
    return subprocess.run(
        [sys.executable, "-m", "omforge", *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )


@pytest.mark.parametrize("command", ["compile", "opt"])
def test_a_full_disk_is_one_error(exported: Exports, empty: Path, command: str) -> None:
    source = exported("optimum", "llama_gqa")
    more = {
        "compile": ("--target", SOC, "-o", empty / "b", *SIZES),
        "opt": ("-p", "canonicalize", "-o", empty / "m.onnx"),
    }[command]
    done = limited(command, source, *more)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write")
    assert "Traceback" not in done.stderr


# --- run ----------------------------------------------------------------------------------------


def test_run_streams_text_to_stdout_and_tells_the_rest_on_stderr(bundle: Path) -> None:
    result = omf("run", bundle, "--prompt", "The list", "--max-new-tokens", "6")
    assert result.out.endswith("\n")
    assert len(result.out) > 1
    assert "lowered: 8 prompt tokens in " in result.err
    assert "6 new tokens, " in result.err
    assert "tokens/s; stopped: --max-new-tokens" in result.err


def test_both_levels_say_the_same(bundle: Path) -> None:
    texts = {
        level: omf(
            *("run", bundle, "--prompt", "The list", "--max-new-tokens", "6"), "--level", level
        ).out
        for level in ("lowered", "canonical")
    }
    assert texts["lowered"] == texts["canonical"]


def test_run_json_and_the_end_of_the_context(bundle: Path) -> None:
    told = omf("run", bundle, "--prompt", "abcd", "--max-new-tokens", "99", "--json").json
    assert told["stopped"] in ("context", "eos")
    assert told["prompt_tokens"] == 4
    if told["stopped"] == "context":
        # The last token needs no slot: nothing reads it.
        assert len(told["tokens"]) == 32 - 4 + 1
    assert told["tokens_per_second"] > 0


def test_sampling_follows_its_seed(bundle: Path) -> None:
    def tokens(seed: int) -> list[int]:
        given = ("run", bundle, "--prompt", "x", "--max-new-tokens", 12, "--temperature", 2)
        return omf(*given, "--top-k", 200, "--top-p", 0.99, "--seed", seed, "--json").json["tokens"]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_run_ends_cleanly_at_ctrl_c(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push, calls = text_stream.TextStream.push, []

    def interrupted(self: text_stream.TextStream, token: int) -> str:
        calls.append(token)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return push(self, token)

    monkeypatch.setattr(text_stream.TextStream, "push", interrupted)
    result = Result("run", bundle, "--prompt", "The list", "--max-new-tokens", "9")
    assert result.status == 130
    assert result.out.endswith("\n")
    assert "stopped: interrupted" in result.err


def test_run_on_the_simulated_device_says_the_same(bundle: Path, tmp_path: Path) -> None:
    given = ("--prompt", "The list", "--max-new-tokens", "6", "--json")
    assert "has no .om" in refused("run", bundle, *given[:2], "--backend", "sim")
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    manifest = Manifest.load(folder)
    buckets = [
        dataclasses.replace(bucket, om=f"om/{bucket.name}.om") for bucket in manifest.buckets
    ]
    for bucket in buckets:
        compile_om(folder, bucket)
    made = {f"om/{file.name}": sha256(file) for file in (folder / "om").glob("*.om")}
    files = {**manifest.files, **made}
    dataclasses.replace(manifest, buckets=tuple(buckets), files=files).save(folder)
    simulated = omf("run", folder, *given, "--backend", "sim").json
    assert simulated["level"] == "sim"
    assert simulated["text"] == omf("run", bundle, *given).json["text"]


def test_run_refuses_a_prompt_beyond_the_context(bundle: Path) -> None:
    said = refused("run", bundle, "--prompt", "x" * 40)
    assert "has 40 tokens" in said
    assert "the bundle's context is 32" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", ""), ("the prompt is empty", "next: Start it with the model's BOS token")),
        (
            ("--prompt", "x", "--temperature", "-1"),
            ("temperature is -1", "next: Leave it away for the default"),
        ),
        (
            ("--prompt", "x", "--top-p", "0"),
            ("top_p is 0", "next: Leave it away for the default"),
        ),
    ],
)
def test_run_refuses_wrong_values(
    bundle: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    said = refused("run", bundle, *arguments)
    assert all(word in said for word in words)


def test_what_no_check_leaves_is_said_and_left(bundle: Path, tmp_path: Path) -> None:
    told = " ".join(omf("run", "--help").out.split())
    assert "hashes in its manifest, whose own always holds." in told
    changed = Path(shutil.copytree(bundle, tmp_path / "changed"))
    file = changed / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    given = ("run", changed, "--prompt", "x", "--max-new-tokens", "1")
    assert "tokenizer_config.json" in refused(*given, status=1)
    omf(*given, "--no-check")
    manifest = changed / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"context": 32', '"context": 31'))
    assert "manifest" in refused(*given, "--no-check")


def test_run_refuses_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    assert "manifest" in refused("run", tmp_path, "--prompt", "x")
    assert "is not a folder" in refused("run", tmp_path / "nowhere", "--prompt", "x")


# --- verify -------------------------------------------------------------------------------------


def test_verify_compares_the_levels_with_the_export(bundle: Path) -> None:
    out = omf("verify", bundle, "--steps", "3").out
    rows = [line.split() for line in out.splitlines() if line.startswith(("canonical", "lowered"))]
    assert {(row[0], row[1]) for row in rows} == {
        ("canonical", "exported"),
        ("lowered", "exported"),
        ("lowered", "canonical"),
    }
    assert all(row[-1] == "equal" for row in rows)
    assert out.endswith("verified\n")


def test_verify_json_and_another_place_of_the_export(
    bundle: Path, exported: Exports, tmp_path: Path
) -> None:
    moved = tmp_path / "model.onnx"
    moved.write_bytes(exported("optimum", "llama_gqa").read_bytes())
    for source in (moved, tmp_path):
        told = omf("verify", bundle, "--source", source, "--steps", "2", "--json").json
        assert told["ok"] is True
        assert told["reference"] == "exported"


def test_verify_fails_with_1_and_says_where(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omforge.ir.numerics import Tolerance

    monkeypatch.setattr(
        "omforge.runtime.judging.tolerance", lambda dtype: Tolerance(rtol=0.0, atol=1e-9)
    )
    result = Result("verify", bundle, "--steps", "2")
    assert result.status == 1
    assert "failed: lowered differs from exported in case" in result.out
    assert "checks failed" in result.out


def test_verify_measures_the_quality(bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the list of the items in the list " * 20)
    words = ("--steps", "1", "--text", text, "--pieces", "1", "--report", tmp_path / "found.json")
    told = omf("verify", bundle, *words, "--json").json
    assert json.loads((tmp_path / "found.json").read_text()) == told
    quality = told["quality"]
    assert (quality["pieces"], quality["piece_tokens"]) == (1, 32)  # as much as the context holds
    assert [level["level"] for level in quality["levels"]] == ["exported", "canonical", "lowered"]
    assert max(layer["output"] for layer in quality["layers"]["layers"]) < 1e-4
    out = omf("verify", bundle, "--steps", "1", "--quality", "--pieces", "1").out
    assert "quality on drawn from the exported model, seed 0: 1 pieces of 32 tokens" in out
    assert "layers     0 of 15 hold integers\n" in out
    assert "output error" not in out
    assert "quality" not in omf("verify", bundle, "--steps", "1").out


def test_verify_judges_the_quality_by_limits(bundle: Path) -> None:
    limits = ("--max-perplexity-increase", "-0.5", "--pieces", "1")
    result = Result("verify", bundle, "--steps", "1", *limits)
    assert result.status == 1
    assert "is 0.0% above exported, the limit is -50.0%" in result.out.replace("-0.0%", "0.0%")


def test_verify_refuses_another_export(bundle: Path, exported: Exports) -> None:
    said = refused("verify", bundle, "--source", exported("optimum", "qwen2"))
    assert "is not the model that the bundle was made from" in said


# --- opt ----------------------------------------------------------------------------------------


def test_opt_writes_the_rewritten_model(relu: Path, tmp_path: Path) -> None:
    out = omf("opt", relu, "-p", "remove-no-ops", "-o", tmp_path / "out.onnx").out
    assert [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node] == ["Relu"]
    assert out.splitlines()[1].split()[:5] == ["remove-no-ops", "1", "2", "->", "1"]


def test_opt_json(relu: Path, tmp_path: Path) -> None:
    pipeline = "inline-functions,remove-no-ops"
    told = omf("opt", relu, "-p", pipeline, "-o", tmp_path / "o.onnx", "--json").json
    assert told["events"] == []
    (first, second) = told["passes"]
    assert (first["pass"], first["rewrites"], first["max_abs_diff"]) == (
        "inline-functions",
        0,
        None,
    )
    assert (second["nodes_before"], second["nodes_after"], second["index"]) == (2, 1, 2)


def test_opt_compares_times_and_prints(exported: Exports, tmp_path: Path) -> None:
    result = omf(
        *("opt", exported("dynamo", "llama_gqa"), "-p", "raise", "-o", tmp_path / "o.onnx"),
        *("--compare-each", "--time", "--print-after", "fuse-swish"),
    )
    assert "// after " in result.err
    assert result.err.count("// after ") == 1
    assert "Swish" in result.err
    rows = {line.split()[0]: line for line in result.out.splitlines() if "->" in line}
    assert 0 < float(rows["fuse-attention"].split()[-1]) < 1e-4
    assert result.out.rstrip().endswith("total")


def test_opt_prints_only_what_changed(relu: Path, tmp_path: Path) -> None:
    result = omf(
        *("opt", relu, "-p", "inline-functions,remove-no-ops", "-o", tmp_path / "o.onnx"),
        "--print-after-changed",
    )
    assert "remove-no-ops: 1 rewrites" in result.err
    assert "inline-functions" not in result.err


def test_opt_bisects(relu: Path, tmp_path: Path) -> None:
    out = omf(
        *("opt", relu, "-p", "inline-functions,remove-no-ops", "-o", tmp_path / "o.onnx"),
        *("--bisect-limit", "1"),
    ).out
    assert out.splitlines()[2].split()[:2] == ["remove-no-ops", "skipped"]
    assert len(onnx.load(tmp_path / "o.onnx").graph.node) == 2


def test_opt_keeps_external_data_external(exported: Exports, tmp_path: Path) -> None:
    source = tmp_path / "in" / "model.onnx"
    source.parent.mkdir()
    model = onnx.load(exported("optimum", "llama_gqa"))
    onnx.save(model, source, save_as_external_data=True, location="weights")
    omf("opt", source, "-p", "raise", "-o", tmp_path / "o.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in", "o.onnx", "o.onnx.data"]
    onnx.load(tmp_path / "o.onnx")


def test_opt_keeps_a_reproducer_of_a_pass_that_fails(
    exported: Exports, tmp_path: Path, empty: Path
) -> None:
    said = refused(
        *("opt", exported("optimum", "llama_gqa"), "-p", "remove-no-ops,fuse-kv-io"),
        *("-o", empty / "o.onnx", "--reproducer", tmp_path / "r"),
        status=1,
    )
    kept = tmp_path / "r" / "before-fuse-kv-io.onnx"
    assert "in pass 2 of 2, fuse-kv-io" in said
    command = f"omforge opt {kept} -p fuse-kv-io"
    assert f"reproduce: {command}" in said
    again = Result(*shlex.split(command)[1:])
    assert again.status == 1
    assert again.err.splitlines()[0] in said


@pytest.mark.parametrize(
    ("pipeline", "more", "words"),
    [
        ("fuse-rmsnorm", (), "Did you mean 'fuse-rms-norm'?"),
        ("bind-shapes{batches=2}", (), "bind-shapes has no option 'batches'"),
        ("remove-no-ops", ("--print-after", "remove-noops"), "Did you mean remove-no-ops?"),
    ],
)
def test_opt_refuses_names_that_it_does_not_know(
    relu: Path, empty: Path, pipeline: str, more: tuple[str, ...], words: str
) -> None:
    assert words in refused("opt", relu, "-p", pipeline, "-o", empty / "o.onnx", *more)


def test_opt_refuses_a_place_that_is_not_there_before_it_starts(relu: Path, empty: Path) -> None:
    said = refused("opt", relu, "-p", "remove-no-ops", "-o", empty / "no" / "o.onnx")
    assert "its folder does not exist" in said
    assert "it is a folder" in refused("opt", relu, "-p", "remove-no-ops", "-o", empty)


# --- check --------------------------------------------------------------------------------------


def test_check_accepts_the_lowered_graphs(bundle: Path) -> None:
    for file in bundle.glob("*_c32.onnx"):
        assert f"legal for {SOC}" in omf("check", file, "--target", SOC).out


def test_check_takes_an_export_that_atc_parses(exported: Exports) -> None:
    told = omf("check", exported("optimum", "llama_gqa"), "--target", SOC).out
    assert f"legal for {SOC}, 621 nodes" in told
    assert "advice (atc takes these):" in told
    assert "3 x the input is int64" in told


def test_check_lists_every_offence_once(exported: Exports) -> None:
    result = Result("check", exported("dynamo", "mistral"), "--target", SOC)
    assert result.status == 1
    assert result.err == ""
    assert "the model's opset is 20, not 16 [opset-version, E13010]" in result.out
    assert "5 x ReduceMean has 2 inputs [onnx-schema]" in result.out
    assert "    at ReduceMean node_mean in m.model.layers.0.input_layernorm" in result.out
    assert "why: " in result.out
    assert "do: " in result.out
    assert "Shape with start 1 [plugin-ignores]" in result.out
    assert f"16 offences for {SOC} in 204 nodes" in result.out


def test_check_names_all_places_if_asked(exported: Exports) -> None:
    path = exported("dynamo", "qwen2")
    few = Result("check", path, "--target", SOC, "--gears").out
    assert "dims batch" not in few  # they are what gears are for
    told = Result("check", path, "--target", SOC, "--all-places").out
    assert " more\n" not in told


def test_check_json(relu: Path) -> None:
    result = Result("check", relu, "--target", SOC, "--json")
    assert result.status == 0
    assert result.json["legal"] is True
    assert {found["level"] for found in result.json["diagnostics"]} == {"advice"}
    fields = {"where", "what", "why", "remedy", "code", "atc", "source", "certainty", "level"}
    assert fields == set(result.json["diagnostics"][0])


def test_check_allows_what_is_inferred_only(relu: Path) -> None:
    said = refused("check", relu, "--target", SOC, "--allow", "registered")
    assert "it is seen, not inferred" in said
    assert "Rules that may be: " in said
    assert "there is no such rule" in refused("check", relu, "--target", SOC, "--allow", "no-such")
    assert omf("check", relu, "--target", SOC, "--allow", "names-safe").status == 0


def test_check_why_tells_forms_reasons_and_bytes(exported: Exports) -> None:
    out = omf("check", exported("optimum", "llama_gqa"), "--target", SOC, "--why").out
    assert re.search(r"decode_c\d+: [\d.]+ KiB a step", out)
    assert "Attention x2 -> MatMul-Softmax: " in out
    assert "not NPUPromptFlashAttention: 310p does not have it" in out
    assert "cache -> per-layer: copies 0 B a step" in out


def test_check_why_can_try_another_form(exported: Exports) -> None:
    path = exported("optimum", "llama_gqa")
    form = ("--form", "RMSNormalization=decomposed")
    told = omf("check", path, "--target", SOC, "--why", *form, "--json").json
    forms = {op["form"] for op in told["graphs"][-1]["operators"] if op["op"] == "RMSNormalization"}
    assert forms == {"decomposed"}
    said = refused("check", path, "--target", SOC, "--why", "--form", "Attention=Flash")
    assert "Attention has no form 'Flash'" in said


def test_compile_to_one_graph_with_gears(exported: Exports, tmp_path: Path) -> None:
    sizes = ("--target", SOC, "-o", tmp_path / "b", "--context", 32, "--prefill", "8,16")
    omf("compile", exported("optimum", "llama_gqa"), *sizes, "--gears")
    (bucket,) = json.loads((tmp_path / "b" / "manifest.json").read_text())["buckets"]
    assert (bucket["kind"], bucket["gears"]) == ("gears", [1, 8, 16])


def test_check_refuses_an_unknown_soc(relu: Path) -> None:
    assert "Did you mean" in refused("check", relu, "--target", "ascend310p3")


# --- explain ------------------------------------------------------------------------------------


def test_explain_says_what_was_raised(exported: Exports) -> None:
    assert omf("explain", exported("dynamo", "mistral")).out.splitlines() == [
        "attention: 2 of 2 raised",
        "rotary: 4 of 4 raised",
        "norm: 5 of 5 raised",
        "mlp: 2 of 2 raised",
    ]


def test_explain_names_the_layer_and_the_node_of_a_miss(exported: Exports, tmp_path: Path) -> None:
    model = ir.load(exported("dynamo", "llama_mha"))
    softmax = [node for node in model.graph if node.op_type == "Softmax"][1]
    softmax.attributes["axis"] = ir.AttrInt64("axis", 2)
    ir.save(model, tmp_path / "model.onnx")
    result = Result("explain", tmp_path / "model.onnx")
    assert result.status == 1
    assert "attention: 1 of 2 raised" in result.out
    assert "layer 1: the softmax is over axis 2" in result.out
    assert omf_lines("explain", tmp_path / "model.onnx", "--layer", "0")[1:] == []


def omf_lines(*arguments: object) -> list[str]:
    """The lines that are no counts."""
    lines = Result(*arguments).out.splitlines()
    return [line for line in lines if not line.endswith("raised") or line.startswith("attention")]


def test_explain_json(exported: Exports) -> None:
    told = omf("explain", exported("optimum", "qwen2"), "--json").json
    assert told["coverage"]["rotary"] == {"found": 4, "expected": 4, "missed": []}
    assert told["misses"] == []


def test_explain_refuses_an_unknown_pass(exported: Exports) -> None:
    assert "no pass 'fuse-all'" in refused(
        "explain", exported("optimum", "qwen2"), "--pass", "fuse-all"
    )


# --- passes -------------------------------------------------------------------------------------


def test_passes_lists_all_with_their_options() -> None:
    out = omf("passes").out
    for name, step in PASSES.items():
        assert any(line.split()[0] == name for line in out.splitlines() if line)
        assert step.summary() in out
    assert "layout=auto" in out


def test_passes_json() -> None:
    told = omf("passes", "--json").json
    ours = {entry["name"] for entry in told["passes"] if not entry["package"]}
    assert ours == set(PASSES)
    assert {name: told["pipelines"][name] for name in PIPELINES} == PIPELINES
    kv = next(entry for entry in told["passes"] if entry["name"] == "fuse-kv-io")
    assert kv["changes_interface"] is True
    assert kv["options"] == [
        {
            "name": "layout",
            "values": "auto|stacked|per-layer",
            "required": False,
            "default": "auto",
        }
    ]


# --- the process --------------------------------------------------------------------------------


def test_verbose_logs_to_stderr_and_nothing_else_does(exported: Exports, tmp_path: Path) -> None:
    given = ("compile", exported("hfexporter", "mistral"), "--target", SOC, "-o", tmp_path / "b")
    command = [sys.executable, "-m", "omforge", *map(str, (*given, *SIZES))]
    quiet, loud = (
        subprocess.run([*command, *more], capture_output=True, text=True, check=True)
        for more in ((), ("-v",))
    )
    assert quiet.stderr == ""
    assert "INFO omforge." in loud.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m omforge passes | head -n 1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


# --- om -------------------------------------------------------------------------------------------


def test_om_shows_what_is_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.om"
    relu = ir.from_proto(onnx.parser.parse_model(RELU))
    simulate_om(relu, file, shapes={"x": (2, 4)})
    assert "float32  [2, 4]" in omf("om", file).out
    told = omf("om", file, "--json").json
    assert told["models"][0]["outputs"][0]["name"] == "Relu_y:0:y"
    file.write_bytes(file.read_bytes()[:-1])
    assert "is truncated or damaged" in refused("om", file)
