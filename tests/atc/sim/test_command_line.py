"""How atc reads its words: hicann/ge:api/atc/cmd_flag_info.cc."""

import pytest

from omforge.atc.flags import flags
from omforge.atc.sim.command_line import Arguments, Helped, parse, usage
from omforge.atc.sim.main import run
from omforge.atc.sim.reports import Refused, Report


def read(*words: str) -> Arguments:
    return parse(words, Report(), [])


def fails(*words: str) -> tuple[tuple[str, ...], list[str]]:
    report, stderr = Report(), list[str]()
    with pytest.raises(Refused):
        parse(words, report, stderr)
    return report.codes, stderr


def test_the_table_holds_every_flag_of_cann_9_2() -> None:
    assert len(flags()) == 90  # 85 in atc_flags.cc, 5 optimisation options in option_register.cc
    assert flags()["precision_mode_v2"].values[:2] == ("fp16", "origin")
    assert [f.name for f in flags().values() if f.type == "bool"] == [
        "help",
        "raw_ge_options_ignore_unsupported",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["--soc_version=Ascend310P3"],
        ["--soc_version", "Ascend310P3"],
        ["-soc_version=Ascend310P3"],  # one hyphen for two
        ["--soc-version=Ascend310P3"],  # a hyphen for the underscore
        ["-soc-version", "Ascend310P3"],
        ["--soc=Ascend310P3"],  # a prefix that no other flag has
        ["--soc_version=Ascend910A", "--soc_version=Ascend310P3"],  # the last one counts
    ],
)
def test_spellings(words: list[str]) -> None:
    assert read(*words)["soc_version"] == "Ascend310P3"


def test_values_are_not_touched() -> None:
    assert read("--output=a-b/c")["output"] == "a-b/c"
    assert read("--output", "--model=x")["output"] == "--model=x"  # the next word, whatever it is


def test_defaults_are_those_of_atc() -> None:
    arguments = read()
    assert arguments["external_weight"] == "0"
    assert arguments["check_report"] == "check_result.json"
    assert arguments.number("mode") == 0
    assert not arguments.on("raw_ge_options_ignore_unsupported")


@pytest.mark.parametrize("word", ["--help", "-h", "--h", "-help", "--help=yes"])
def test_help_ends_well_whatever_follows(word: str) -> None:
    with pytest.raises(Helped):
        read(word, "--no_such_flag=1")
    result = run([word])
    assert result.exit_status == 0
    assert "--soc_version" in result.text
    assert "ATC run" not in result.text


def test_help_can_be_turned_off() -> None:
    assert read("--help=no", "--mode=0").number("mode") == 0


@pytest.mark.parametrize(
    "word", ["--quant_type=INT8", "--enable_fusion=true", "--nope", "-z", "--dynamic=1"]
)
def test_an_unknown_flag_or_an_ambiguous_prefix_stops_the_run(word: str) -> None:
    name = word.lstrip("-").partition("=")[0]
    assert fails(word) == ((), [f"ERROR: unknown command line flag '{name}'"])


def test_an_unknown_flag_is_an_internal_error_to_the_shell() -> None:
    result = run(["--quant_type=INT8"])
    assert result.exit_status == 255
    assert "Try 'atc --help' for more information\nE19999: Internal Error!" in result.stdout
    assert result.stderr == "ERROR: unknown command line flag 'quant_type'\n"


def test_every_flag_but_two_needs_an_argument() -> None:
    codes, stderr = fails("--model")
    assert (codes, stderr) == ((), ["ERROR: flag '--model' is missing its argument"])
    assert read("--raw_ge_options_ignore_unsupported").on("raw_ge_options_ignore_unsupported")


def test_a_positional_word_stops_the_run() -> None:
    """The usual cause is a semicolon that the shell took: `--input_shape=a:1;b:1`."""
    _, stderr = fails("--mode=0", "b:1", "--log=info", "c")
    assert stderr == ["ERROR: Non-option parameter: b:1", "ERROR: Non-option parameter: c"]


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("--mode=2", "E10001"),  # enumerated
        ("--precision_mode=allow_quantize", "E10001"),
        ("--op_debug_level=x", "E10001"),  # its values are checked ahead of its type
        ("--external_weight=3", "E10006"),
        ("--log=verbose", "E10010"),
        ("--framework=2", "E10007"),
        ("--raw_ge_options_ignore_unsupported=maybe", "E10003"),
        ("--log=", "E10010"),
    ],
)
def test_values_are_checked_while_reading(word: str, code: str) -> None:
    assert fails(word)[0] == (code,)


def test_the_range_is_told() -> None:
    report = Report()
    with pytest.raises(Refused):
        parse(["--core_type=Cube"], report, [])
    assert report.errors[0].text == (
        "Value Cube for parameter --core_type is invalid. Reason: The value is not within the "
        "range of values. The valid range is [AiCore] [VectorCore] ."
    )


def test_the_usage_names_every_flag() -> None:
    text = usage()
    assert all(f"--{name} " in text for name in flags())
