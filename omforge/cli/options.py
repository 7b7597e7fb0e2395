"""Options that several commands share: what they are called, and what they say in --help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from omforge.cli import console

if TYPE_CHECKING:
    from omforge.atc.build import BuildOptions


def _verbose(on: bool) -> None:
    if on:
        console.be_verbose()


Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", callback=_verbose, help="Log to stderr what passes do.")
]
Soc = Annotated[
    str,
    typer.Option(
        "--target",
        help="The SoC, as atc's --soc_version: Ascend310P3, ...; cpu: ONNX Runtime here.",
    ),
]
Task = Annotated[
    Literal["auto", "generate", "encode"],
    typer.Option(
        help="Continue texts with a KV cache, or take whole texts in one run; auto: by the graph.",
    ),
]
Dtype = Annotated[
    Literal["auto", "fp16", "bf16", "fp32"],
    typer.Option(
        help="Dtype of the lowered graphs; bf16 on A2, A3 and 950; auto: fp16, on the CPU fp32."
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens that a sequence may hold; the model's own limit, at most 2048, if absent.",
    ),
]
Pair = Annotated[
    str, typer.Option(metavar="TEXT", help="A second text, for models that judge two (rerankers).")
]
Save = Annotated[
    Path | None,
    typer.Option(metavar="FILE.npz", help="Keep all that an encoder gives, by its names."),
]
Prefill = Annotated[
    str,
    typer.Option(
        metavar="S,...",
        help="Lengths of the prefill buckets, 128 if absent; of all buckets without a cache.",
    ),
]
BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="What `compile` made.")]
Model = Annotated[Path, typer.Argument(metavar="IN.onnx", help="Any ONNX model.")]
Forms = Annotated[
    list[str] | None,
    typer.Option(metavar="OP=FORM", help="Lower an operator to this form; see `check --why`."),
]

Front = Annotated[
    Literal["auto", "onnx", "air"],
    typer.Option(
        help="What atc is given: ONNX graphs, or GE graphs (.air), which may write the cache in "
        "place; auto: ONNX, until facts show that the device does."
    ),
]
Facts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE|none",
        help="What `probe` saw: it goes before what the tables infer. The one in the user's "
        "configuration folder if absent.",
    ),
]

WhyFront = Annotated[
    Literal["onnx", "air"] | None,
    typer.Option("--front", help="With --why, of an export: what atc is given."),
]

PrintAfter = Annotated[
    str,
    typer.Option(
        "--print-after", metavar="NAMES", help="Write the graph as text to stderr after these."
    ),
]
PrintAfterChanged = Annotated[
    bool,
    typer.Option("--print-after-changed", help="The same, after passes that changed it."),
]
VerifyEach = Annotated[
    bool,
    typer.Option("--verify-each/--no-verify-each", help="Verify the graph after each pass."),
]
Time = Annotated[bool, typer.Option("--time", help="Add what each pass took, the slowest first.")]
BisectLimit = Annotated[
    int | None, typer.Option("--bisect-limit", min=0, help="Run only the first N passes.")
]
BisectRewrites = Annotated[
    int | None,
    typer.Option(
        "--bisect-rewrites",
        min=0,
        help="Make only the first N rewrites; a pass that is no pattern is counted whole.",
    ),
]
Reproducer = Annotated[
    Path | None,
    typer.Option(
        "--reproducer", metavar="DIR", help="Where to keep the graph ahead of a pass that fails."
    ),
]
CompareEach = Annotated[
    bool,
    typer.Option("--compare-each", help="Run the model on the CPU before and after each pass."),
]

InsertPass = Annotated[
    list[str] | None,
    typer.Option(
        "--insert-pass",
        metavar="after=PASS:PIPELINE",
        help="Run passes of your own behind one that raises, or `before=` it; repeatable.",
    ),
]

Atc = Annotated[
    str,
    typer.Option(
        metavar="auto|sim|none|PATH",
        help="The atc that compiles the graphs: the installed one, the simulated one, none.",
    ),
]
AtcFlags = Annotated[
    list[str] | None,
    typer.Option("--atc-flag", metavar="--NAME=VALUE", help="A further flag for atc; repeatable."),
]
AtcWords = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- FLAGS]", help="Further flags for atc, as it takes them itself."),
]
AtcJobs = Annotated[
    int, typer.Option("--atc-jobs", min=0, help="Compilations at a time; 0: as memory allows.")
]
AtcCached = Annotated[
    bool, typer.Option("--atc-cache/--no-atc-cache", help="Take and keep what atc made before.")
]

Quantize = Annotated[
    str,
    typer.Option(
        metavar="int8|int4[:g32|g64|g128][:asym][:rtn|hqq|gptq|awq]|w8a8",
        help="Store the weights of linear layers as integers; w8a8: what they read is int8 too.",
    ),
]
KvDtype = Annotated[
    Literal["fp16", "int8", "int8:channel", "int8:head"],
    typer.Option(
        "--kv-dtype",
        help="Dtype of the cache; int8, with a scale per channel unless said, needs --calibration.",
    ),
]
CheckHashes = Annotated[
    bool,
    typer.Option(
        "--check/--no-check",
        help="Compare the bundle's files with the hashes in its manifest, whose own always holds.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Let the bundle's atc commands write outside of the bundle."),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A text, or token numbers [pieces, tokens] as .npy: for gptq, awq, w8a8, int8 cache.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        metavar="cpu|sim|acl|NAME",
        help="acl: an NPU; sim: a simulated one; or the name of a plugin's.",
    ),
]
Give = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.npz",
        help="By name, what is given once for a text: an encoder's keys and values, an adapter.",
    ),
]
EncoderLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Length of the encoder's states that a decoder attends to; what the export says, "
        "if absent.",
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        metavar="SIZE|rest",
        help="Bytes of a graph's constants (3.9GiB, 120MB; rest: what --memory leaves): layers "
        "that need it get more bits than --quantize says. --calibration tells which.",
    ),
]
Memory = Annotated[
    str,
    typer.Option(metavar="SIZE", help="What the device has (6GiB, 800MB); what takes more fails."),
]
Lengths = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Prompts' lengths, a number of tokens a line; a second number is the answer's.",
    ),
]
Graphs = Annotated[
    int, typer.Option(help="How many graphs a plan may have, the decode graph among them.")
]
PlanHow = Annotated[
    Literal["", "auto"],
    typer.Option("--plan", help="auto: choose prefill lengths for the prompts of --lengths."),
]
Batch = Annotated[int, typer.Option(min=1, help="Rows of every bucket.")]
Gears = Annotated[
    bool, typer.Option("--gears", help="One graph for all buckets, their lengths its gears.")
]
Layout = Annotated[
    Literal["auto", "stacked", "per-layer"],
    typer.Option(
        help="One cache tensor, or two for each layer; auto: what moves the fewest bytes."
    ),
]

Quality = Annotated[
    bool | None,
    typer.Option(
        "--quality/--no-quality",
        help="Also measure perplexity, KL and layers; if absent, where weights are quantised.",
    ),
]
QualityText = Annotated[
    Path | None,
    typer.Option(
        "--text", metavar="FILE", help="The text for --quality; the export writes one if absent."
    ),
]
QualityPieces = Annotated[
    int, typer.Option("--pieces", min=1, help="Pieces of 256 tokens that --quality measures.")
]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Keep all that was found, as JSON."),
]
MaxKl = Annotated[
    float | None, typer.Option("--max-kl", min=0, help="Fail above this mean KL, in nats a token.")
]
MaxIncrease = Annotated[
    float | None,
    typer.Option(
        "--max-perplexity-increase", help="Fail above this share of the export's perplexity: 0.05."
    ),
]


def build_options(atc: str, jobs: int, cached: bool, *, trusted: bool = False) -> BuildOptions:
    """Return what --atc, --atc-jobs, --atc-cache and --trust say."""
    from omforge.atc.build import BuildOptions

    if cached:
        return BuildOptions(atc, jobs, trusted=trusted)
    return BuildOptions(atc, jobs, cache=None, trusted=trusted)


def forms(given: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Return OP=FORM as pairs; whether there are such is `legalize`'s to say."""
    pairs = [item.partition("=")[::2] for item in given or ()]
    return tuple((op.strip(), form.strip()) for op, form in pairs)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the numbers of a list such as 128,512.

    Raises:
        InputError: It is none.
    """
    from omforge.ir.errors import InputError

    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(
            f"{option} {text}", "it is no list of numbers", f"Write {option} 128,512"
        ) from None


def pass_names(text: str, known: Sequence[str]) -> list[str]:
    """Return the passes of --print-after.

    Raises:
        InputError: One is not in the pipeline, which runs those that are known.
    """
    from difflib import get_close_matches

    from omforge.ir.errors import InputError

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise InputError(
                f"--print-after {name}",
                f"there are {', '.join(dict.fromkeys(known)) or 'none'}",
                f"Did you mean {near[0]}?" if near else "Name one of these",
            )
    return names
