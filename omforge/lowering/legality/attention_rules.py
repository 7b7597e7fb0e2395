"""Rules for ATC's own attention operators: the forms that parse, and what a SoC runs."""

from __future__ import annotations

from collections.abc import Iterator

from omforge import ir
from omforge.lowering.legality.subject import Finding, Rule, Subject, static_shape

_INT32_MAX = 2147483647
_DECOMPOSE = "lower attention to MatMul and Softmax (the default)"
_LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND")
_KINDS = {
    "num_heads": ir.AttributeType.INT,
    "input_layout": ir.AttributeType.STRING,
    "scale_value": ir.AttributeType.FLOAT,
    "pre_tokens": ir.AttributeType.INT,
    "next_tokens": ir.AttributeType.INT,
    "num_key_value_heads": ir.AttributeType.INT,
    "sparse_mode": ir.AttributeType.INT,
    "inner_precise": ir.AttributeType.INT,
}
_WRITTEN = ("scale_value", "pre_tokens")

_NEVER = {
    "NPUIncreFlashAttention": "its plugin leaves key and value unconnected",
    "NPUFlashAttention": "its plugin crashes on a query that is no graph input",
    "NPUDtypeCast": "it becomes a Cast without a destination type",
    "NPUFormatCast": "it becomes an Identity: acl_format is ignored",
    "NPUScatter": "it maps to ArgMaxGrad, which is another operator",
}


def never_emitted(subject: Subject) -> Iterator[Finding]:
    """Operators that parse and do not do what they say."""
    for node in subject.nodes:
        if node.op_type in _NEVER and node.domain in ("", "ai.onnx", "npu"):
            yield Finding(
                ir.describe(node),
                f"{node.op_type} must not be used",
                _NEVER[node.op_type],
                "use standard operators: attention as MatMul and Softmax, Cast, ScatterND",
                _refusal(node),
            )


def _refusal(node: ir.Node) -> str:
    """The error where the plugin does fail; most of these pass without a word."""
    if node.op_type == "NPUIncreFlashAttention" and len(node.inputs) != 6:
        return "EZ9999"
    if node.op_type != "NPUFlashAttention":
        return ""
    layout = node.attributes.get("input_layout")
    text = layout is not None and layout.type == ir.AttributeType.STRING
    if layout is not None and text and layout.as_string() not in ("BSH", "SBH"):
        return "EZ9999"
    return "E19999"


def _flash(subject: Subject) -> Iterator[ir.Node]:
    for node in subject.nodes:
        if node.op_type == "NPUPromptFlashAttention" and node.domain in ("", "ai.onnx", "npu"):
            yield node


def flash_inputs(subject: Subject) -> Iterator[Finding]:
    """NPUPromptFlashAttention has 3, 5, 7, 9 or 12 inputs, all of them there."""
    for node in _flash(subject):
        given = sum(value is not None for value in node.inputs)
        if given != len(node.inputs) or given not in (3, 5, 7, 9, 12):
            yield Finding(
                ir.describe(node),
                f"NPUPromptFlashAttention with {given} of {len(node.inputs)} inputs given",
                "only 3, 5, 7, 9 or 12 inputs parse, none of them absent",
                f"{_DECOMPOSE}; else give a zero-element pse (910B and A3)",
            )


def flash_attributes(subject: Subject) -> Iterator[Finding]:
    """NPUPromptFlashAttention's attributes have the type that the plugin reads."""
    for node in _flash(subject):
        place = ir.describe(node)
        for name in _WRITTEN:
            if name not in node.attributes:
                yield Finding(
                    place,
                    f"NPUPromptFlashAttention without {name}",
                    "the plugin's default is 1.0 for scale_value, and 0 for pre_tokens",
                    f"write {name}",
                )
        for name, attribute in node.attributes.items():
            kind = _KINDS.get(name)
            if kind is None:
                continue
            if attribute.type != kind:
                yield Finding(
                    place,
                    f"{name} is not given as {kind.name}",
                    "of another type it is silently the default",
                    f"write {name} as {kind.name}",
                )
            elif kind == ir.AttributeType.INT and attribute.as_int() > _INT32_MAX:
                yield Finding(place, f"{name} exceeds int32", "it is truncated", "use 2147483647")


def flash_layout(subject: Subject) -> Iterator[Finding]:
    """NPUPromptFlashAttention's input_layout is one that the kernel knows."""
    for node in _flash(subject):
        layout = node.attributes.get("input_layout")
        if layout is None or layout.type != ir.AttributeType.STRING:
            continue  # reported by flash_attributes
        if layout.as_string() not in _LAYOUTS:
            yield Finding(
                ir.describe(node),
                f"input_layout {layout.as_string()}",
                f"the layouts are {', '.join(_LAYOUTS)}",
                "transpose to one of them",
            )


def flash_on_310p(subject: Subject) -> Iterator[Finding]:
    """310P runs prompt flash attention without mask and grouped heads only."""
    if subject.target.family.name != "310p":
        return
    for node in _flash(subject):
        place = ir.describe(node)
        if len(node.inputs) > 3:
            yield Finding(
                place,
                "a mask or pse input on 310P",
                "310P refuses any pse tensor, and a mask needs a pse slot",
                _DECOMPOSE,
            )
        for name, allowed in (
            ("num_key_value_heads", (0,)),
            ("sparse_mode", (0,)),
            ("next_tokens", (0, _INT32_MAX)),
        ):
            attribute = node.attributes.get(name)
            if attribute is None or attribute.type != ir.AttributeType.INT:
                continue
            if attribute.as_int() not in allowed:
                yield Finding(
                    place,
                    f"{name} {attribute.as_int()} on 310P",
                    f"310P takes {' or '.join(map(str, allowed))}",
                    "repeat the kv heads, or decompose",
                )


def flash_sizes(subject: Subject) -> Iterator[Finding]:
    """Head sizes and grouping are inside the documented range."""
    for node in _flash(subject):
        heads = node.attributes.get("num_heads")
        layout = node.attributes.get("input_layout")
        if heads is None or layout is None or not node.inputs:
            continue  # reported by plugin_attributes
        if heads.type != ir.AttributeType.INT or layout.type != ir.AttributeType.STRING:
            continue
        kv = node.attributes.get("num_key_value_heads")
        shared = kv.as_int() if kv is not None and kv.type == ir.AttributeType.INT else 0
        if shared and heads.as_int() % shared:
            yield Finding(
                ir.describe(node),
                f"{heads.as_int()} heads in groups of {shared} kv heads",
                "num_key_value_heads divides num_heads",
                _DECOMPOSE,
            )
        shape = static_shape(node.inputs[0])
        if shape is None:
            continue
        flat = layout.as_string() == "BSH"
        size = shape[-1] // max(heads.as_int(), 1) if flat else shape[-1]
        if size > 512:
            yield Finding(
                ir.describe(node), f"a head size of {size}", "it is at most 512", _DECOMPOSE
            )


_FLASH = "mirror-cann/ops-transformer:attention/prompt_flash_attention"
_FRAMEWORK = f"{_FLASH}/framework/npu_prompt_flash_attention_onnx_plugin.cpp"
_LIMITS = f"{_FLASH}/docs/aclnnPromptFlashAttentionV3.md"

RULES = (
    Rule(
        "never-emitted",
        "parses, and is wrong",
        "mirror-cann/ops-transformer:attention/*/framework; hicann/ops-math:math/cast/framework; "
        "hicann/ops-nn:index/scatter/framework",
        never_emitted,
        "seen",
    ),
    Rule("flash-inputs", "E19999 ReLinkInputDataEdge", _FRAMEWORK, flash_inputs, "seen"),
    Rule("flash-attributes", "wrong numbers", _FRAMEWORK, flash_attributes, "seen"),
    Rule("flash-layout", "an error of the kernel", _LIMITS, flash_layout),
    Rule("flash-310p", "an error of the kernel's tiling", f"{_FLASH} (tiling)", flash_on_310p),
    Rule("flash-sizes", "an error of the kernel's tiling", _LIMITS, flash_sizes),
)
