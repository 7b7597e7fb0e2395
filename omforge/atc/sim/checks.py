"""What atc checks between its command line and the model, in its order.

Sources: hicann/ge:api/atc/main_impl.cc (GFlagUtils::CheckFlags and its callers) and
compiler/api/aclgrph/option_utils.cc.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

from omforge.atc.flags import flags
from omforge.atc.sim import paths
from omforge.atc.sim.command_line import FRAMEWORKS, Arguments
from omforge.atc.sim.reports import Refused, Report
from omforge.atc.sim.shapes import Shapes, read_shapes
from omforge.ir.json_text import parse_json

GENERATE, TO_JSON, PRE_CHECK, TEXT_TO_JSON, DISPLAY, OM2, NANO = 0, 1, 3, 5, 6, 7, 30
MINDSPORE, ONNX = 1, 5

_SUFFIX = {NANO: ".exeom", OM2: ".om2"}
_NANO_SOCS = ("Ascend035", "Ascend035A", "Ascend035B")
_OUTPUT_TYPES = flags()["output_type"].values_checked_later
_MIXED = ("allow_mix_precision", "allow_mix_precision_fp16", "allow_mix_precision_bf16")
_MIXED_V2 = ("mixed_float16", "mixed_bfloat16", "mixed_hif8")

# The names of <SoC>.ini in platform_config of CANN 8.1.RC1, and the families added since.
_SOC = re.compile(
    r"Ascend(310|310B[1-4]|310P[1357]|610|610Lite|910[AB]?|910ProA|910ProB|910PremiumA"
    r"|910B(1|2|2C|3|4|4-1)|910_93(62|72|81|82|91|92)|910_95\w*|950\w*|910_5591"
    r"|031|035[AB]?|BS9SX\w*)"
)


def check_global(arguments: Arguments, report: Report) -> None:
    """main_impl.cc:CheckGlobalOptionsBeforeRun."""
    tuning = arguments["auto_tune_mode"]
    if tuning:
        reason = "The Auto Tune function has been deprecated. Please use the AOE tool for tuning."
        _invalid(report, "--auto_tune_mode", tuning, reason)
    if "deterministic_level" in arguments.given:
        one, level = arguments["deterministic"], arguments["deterministic_level"]
        if (one == "0") != (level == "0"):
            _invalid(
                report,
                "ge.deterministic / ge.deterministicLevel",
                f"{one} / {level}",
                "must both be 0 or both non-zero.",
            )


def check_framework(arguments: Arguments, report: Report) -> None:
    """main_impl.cc:CheckWeightAndFrameWork and CheckSocVersionAndRunmode."""
    mode, framework = arguments.number("mode"), arguments["framework"]
    if mode == TO_JSON and framework == "1":
        reason = (
            "The framework must be selected from {0(Caffe), 3(TensorFlow), 5(Onnx)} "
            "when model is set to 1(JSON)."
        )
        _invalid(report, "--framework", framework, reason)
    if arguments["weight"]:
        paths.check_input(arguments["weight"], "--weight", report)
    if mode in (GENERATE, NANO, PRE_CHECK):
        if framework == "-1":
            report.error("E10007", parameter="framework", support=FRAMEWORKS)
            raise Refused
        if framework == "0" and not arguments["weight"]:
            report.error("E10008")
            raise Refused
    soc = arguments["soc_version"]
    if (mode == NANO) != (soc in _NANO_SOCS):
        named = f" {' '.join(_NANO_SOCS)} " if mode == NANO else soc
        text = f"Option soc_version {named} and mode {NANO} must be set together"
        report.error("E10055", reason=text)
        raise Refused


def check_flags(arguments: Arguments, report: Report) -> Shapes:
    """main_impl.cc:PrepareOmGeneration: all flags of a compilation.

    Returns:
        What they say of the inputs' shapes.

    Raises:
        Refused: One is wrong.
    """
    _check_format(arguments, report)
    mode = arguments.number("mode")
    makes_file = mode in (GENERATE, NANO, OM2)
    required = ["soc_version", *(["output"] if makes_file else []), "model"]
    for name in required:
        if not arguments[name]:
            report.error("E10054", parameter=f"--{name}")
            raise Refused
    paths.check_input(arguments["model"], "--model", report)
    if makes_file:
        _check_output(arguments["output"], _SUFFIX.get(mode, ".om"), report)
    _check_implmode(arguments, report)
    _check_input_file(arguments, "op_precision_mode", report)
    _check_precision(arguments, report)
    shapes = read_shapes(arguments, report)
    if arguments["insert_op_conf"] and arguments["dynamic_dims"]:
        reason = "The dynamic dims function does not support AIPP."
        _invalid(report, "--insert_op_conf", arguments["insert_op_conf"], reason)
    for name in ("weight", "cal_conf", "op_name_map", "insert_op_conf", "compress_weight_conf"):
        _check_input_file(arguments, name, report)
    if arguments["enable_compress_weight"] == "true" and arguments["compress_weight_conf"]:
        pair = ("enable_compress_weight", "compress_weight_conf")
        _check_later(arguments, pair[0], report)
        report.error("E10047", parameter0=pair[0], parameter1=pair[1])
        raise Refused
    _check_input_file(arguments, "keep_dtype", report)
    paths.check_output(arguments["check_report"], "--check_report", report)
    for name in _CHECKED_LATER:
        _check_later(arguments, name, report)
    _check_host(arguments, report)
    limit = arguments["static_model_ops_lower_limit"]
    if limit and (not re.fullmatch(r"-?[0-9]+", limit) or int(limit) < -1):
        _invalid(report, "--static_model_ops_lower_limit", limit, "It must be in [-1, int64 max].")
    return shapes


_CHECKED_LATER = (
    "enable_compress_weight",
    "save_original_model",
    "enable_single_stream",
    "ac_parallel_enable",
    "tiling_schedule_optimize",
    "allow_hf32",
    "quant_dumpable",
    "enable_attr_compression",
)


def _check_later(arguments: Arguments, name: str, report: Report) -> None:
    value, allowed = arguments[name], flags()[name].values_checked_later
    if value in ("", *allowed):
        return
    report.error("E10005" if "true" in allowed else "E10006", parameter=name, value=value)
    raise Refused


def _check_format(arguments: Arguments, report: Report) -> None:
    layout = arguments["input_format"]
    if layout and layout not in flags()["input_format"].values_checked_later:
        reason = "The value must be NCHW, ND or NCDHW in ONNX model."
        _invalid(report, "--input_format", layout, reason)


def _check_output(path: str, suffix: str, report: Report) -> None:
    # What E10021 says of too long a path, this has said already.
    paths.check_output(path + suffix, "--output", report)
    if path.endswith(("/", "\\")):
        report.error("E10022", parameter="output", filename=path)
        raise Refused


def _check_input_file(arguments: Arguments, name: str, report: Report) -> None:
    if arguments[name]:
        paths.check_input(arguments[name], f"--{name}", report)


def _check_implmode(arguments: Arguments, report: Report) -> None:
    """option_utils.cc:CheckImplmodeParamValid."""
    if arguments["optypelist_for_implmode"] and not arguments["op_select_implmode"]:
        reason = (
            "Parameters --op_select_implmode and --optypelist_for_implmode "
            "must be set at the same time."
        )
        _invalid(report, "--op_select_implmode", "", reason)


def _check_precision(arguments: Arguments, report: Report) -> None:
    """main_impl.cc:CheckPrecisionRelatedFlags."""
    if arguments["is_weight_clip"] not in ("0", "1"):
        report.error("E10006", parameter="is_weight_clip", value=arguments["is_weight_clip"])
        raise Refused
    one, two = arguments["precision_mode"], arguments["precision_mode_v2"]
    if one and two:
        report.error("E10056", parameter1="--precision_mode", parameter2="--precision_mode_v2")
        raise Refused
    mixlist = arguments["modify_mixlist"]
    if mixlist and one not in _MIXED and two not in _MIXED_V2:
        reason = f"precision_mode must be one of {_MIXED}, or precision_mode_v2 one of {_MIXED_V2}."
        _invalid(report, "--modify_mixlist", mixlist, reason)


def _check_host(arguments: Arguments, report: Report) -> None:
    """option_utils.cc:CheckHostEnvOsAndHostEnvCpuStringValid."""
    os_, cpu = arguments["host_env_os"], arguments["host_env_cpu"]
    if os_ not in ("", "linux", "minios"):
        reason = f"The OS {os_} is invalid. It should be like 'linux' or 'minios'."
        _invalid(report, "--host_env_os", os_, reason)
    if cpu not in ("", "x86_64", "aarch64", "arm64", "arm"):
        reason = f"The CPU {cpu} is invalid. It should be like 'x86_64' or 'aarch64'."
        _invalid(report, "--host_env_cpu", cpu, reason)


def check_environment(arguments: Arguments, report: Report) -> None:
    """What fails once the libraries start: an unknown SoC, calibration without its library."""
    soc = arguments["soc_version"]
    if not _SOC.fullmatch(soc):
        # hicann/ge:compiler/engines/nn_engine/utils/common/platform_utils.cc; the code's text is
        # registered elsewhere, so it is written as that of E10001.
        report.inner(
            f"Value {soc} for parameter ge.socVersion is invalid. Reason: The corresponding "
            "platform configuration file cannot be found based on the configured soc_version",
            "E20101",
        )
        raise Refused
    if arguments["compression_optimize_conf"]:
        # main_impl.cc:CallAmctInterface. It comes after the model is parsed; without an NPU it
        # fails whatever the model is.
        conf = arguments["compression_optimize_conf"]
        _invalid(report, "--compression_optimize_conf", conf, "AMCT is not installed, error: ")


def check_output_type(arguments: Arguments, report: Report) -> None:
    """hicann/ge:api/atc/omg.cc:ParseOutputType, for one type and for node:index:type."""
    text = arguments["output_type"]
    if not text:
        return
    for item in text.split(";"):
        words = item.split(":")
        if len(words) not in (1, 3):
            _invalid(report, "--output_type", item, "It should be node:index:type.")
        if words[-1].strip() not in _OUTPUT_TYPES:
            allowed = ", ".join(t for t in _OUTPUT_TYPES if t != "HIF4")
            reason = f"The current value is not within the valid range. Only support {allowed}."
            _invalid(report, "--output_type", words[-1].strip(), reason)


def load_raw_options(arguments: Arguments, report: Report) -> None:
    """main_impl.cc:LoadRawGeOptions: the file is read and its form checked.

    The simulator acts on few of its options (`Arguments.raw_options`); names are not checked
    against atc's list.
    """
    file = arguments["raw_ge_options"]
    if not file:
        return
    paths.check_input(file, "--raw_ge_options", report)
    try:
        content: Any = parse_json(Path(file).read_bytes())
    except ValueError as error:
        report.error("E10032", file_name=file, reason="Invalid JSON format")
        raise Refused from error
    options: Any = (
        cast(dict[str, Any], content).get("compile options")
        if isinstance(content, Mapping)
        else None
    )
    if not isinstance(options, Mapping):
        reason = 'raw_ge_options must contain object "compile options"'
        report.error("E10032", file_name=file, reason=reason)
        raise Refused
    arguments.raw_options |= {str(n): str(v) for n, v in cast(dict[str, Any], options).items()}


def _invalid(report: Report, parameter: str, value: object, reason: str) -> NoReturn:
    report.error("E10001", parameter=parameter, value=value, reason=reason)
    raise Refused
