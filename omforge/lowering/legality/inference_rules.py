"""Rules for what GE's type and shape inference finds behind the parser."""

from __future__ import annotations

from collections.abc import Iterator

from omforge import ir
from omforge.lowering.ge_inference import Kind, Misfit
from omforge.lowering.legality.subject import Finding, Rule, Subject
from omforge.lowering.value_bounds import one_hot_may_wrap, sign_of_mod_differs


def shapes_fit(subject: Subject) -> Iterator[Finding]:
    """The shapes of a node's inputs fit each other and its attributes."""
    for found in _misfits(subject, "shapes"):
        yield Finding(
            ir.describe(found.node),
            found.what,
            found.why,
            "mend the shapes: ONNX Runtime does not run such a node either",
        )


def one_dtype(subject: Subject) -> Iterator[Finding]:
    """Inputs that the operator has one type for are of one dtype, as GE makes them."""
    for found in _misfits(subject, "dtypes"):
        yield Finding(
            ir.describe(found.node),
            found.what,
            found.why,
            "cast one of them; behind TopK `omforge compile` does",
        )


def output_dtypes(subject: Subject) -> Iterator[Finding]:
    """The graph's outputs have the dtypes that the model says."""
    for found in _misfits(subject, "output"):
        yield Finding(
            ir.describe(found.node),
            found.what,
            found.why,
            "cast it in the graph, or read it as what the .om's description says",
        )


def sizes_are_static(subject: Subject) -> Iterator[Finding]:
    """In a graph of static inputs, no size depends on data."""
    claims = all(value.shape is not None and value.shape.is_static() for value in subject.inputs)
    on_soc = subject.target.family.run_time_sizes
    for found in _misfits(subject, "sizes"):
        if subject.gears:
            why = f"{found.why}, and gears take no such operator"
        else:
            why = f"{found.why}; on {subject.target.soc_version} {on_soc.text}"
        yield Finding(
            ir.describe(found.node),
            found.what,
            why,
            "compute it from shapes and constants, or work on all elements under a mask",
            level=None if claims or subject.gears else "advice",
            source=found.source,
        )


def mod_signs(subject: Subject) -> Iterator[Finding]:
    """Mod of integers without fmod has no operand that may be negative."""
    for node in filter(sign_of_mod_differs, subject.nodes):
        yield Finding(
            ir.describe(node),
            "Mod of integers that may be negative",
            "GE's Mod is x - trunc(x / y) * y, which is ONNX's with fmod=1; without it the result "
            "has the divisor's sign",
            "make the graph by `omforge compile`, which writes Mod(Mod(x, y) + y, y) with fmod=1",
        )


def one_hot_indices(subject: Subject) -> Iterator[Finding]:
    """OneHot's indices are below its depth."""
    for node in filter(one_hot_may_wrap, subject.nodes):
        yield Finding(
            ir.describe(node),
            "OneHot of indices that may be outside of its depth",
            "they wrap around (the plugin adds depth and takes Mod), where ONNX gives a row of off "
            "values",
            "make sure that indices are below depth, or compare with a Range",
        )


def _misfits(subject: Subject, kind: Kind) -> Iterator[Misfit]:
    return (found for found in subject.misfits if found.kind == kind)


_INFERENCE = "hicann/ops-math, ops-nn, ops-cv (*_infershape.cpp); the operators' schemas"
_MOD_PLUGIN = "hicann/ops-math:math/mod/framework/mod_onnx_plugin.cpp"
_MOD = f"hicann/ops-math:math/mod/op_graph/mod_proto.h; {_MOD_PLUGIN}"

RULES = (
    Rule(
        "shapes-fit", "EZ9999: InferShape fails, or a kernel does", _INFERENCE, shapes_fit, "seen"
    ),
    Rule("one-dtype", "E89999, or no kernel", _INFERENCE, one_dtype, "seen"),
    Rule(
        "output-dtype",
        "an output of another dtype",
        "the operators' prototypes (*_proto.h), see onnx_plugins.tsv",
        output_dtypes,
        level="advice",
    ),
    Rule(
        "static-sizes",
        "a dynamic shape, or a failure of what follows",
        "hicann/ops-math, ops-nn, ops-cv (InputsDataDependency of *_infershape.cpp)",
        sizes_are_static,
        "seen",
    ),
    Rule("mod-sign", "wrong numbers without a word", _MOD, mod_signs, "seen"),
    Rule(
        "one-hot-range",
        "a wrapped index",
        "hicann/ops-math:math/one_hot/framework/onehot_onnx_plugin.cpp",
        one_hot_indices,
        "seen",
        level="advice",
    ),
)
