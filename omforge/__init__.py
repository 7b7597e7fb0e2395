"""omforge rewrites exported LLM graphs into what Ascend's ATC compiler accepts, and proves it.

    import omforge as of

    raised = of.raise_("export/")                   # standard ONNX: attention, norms, rotary
    print(raised.coverage, raised.events)

    bundle = of.compile("export/", target="Ascend910B4", output="bundle", context=2048)
    assert bundle.verify().ok                       # lowered graphs against the export
    print(bundle.generate("Hello").text)

What there is, on one page:

    load(source) -> onnx_ir.Model           checked; weights stay mapped
    raise_(model) -> Rewritten              .model, .coverage, .events, .passes, .seconds
    Pipeline.parse("canonicalize,my-pass")  .run(model, compare=True) -> Rewritten
    check(model, target) -> Checked         .legal, .errors, .advice
    compile(model, target=, output=, ...)   -> Bundle; names and defaults of `omforge compile`
    Bundle.open(folder)                     .manifest, .compiled
        .generate(text or ids) -> Generated .text, .tokens, .stopped
        .encode(text, pair)                 outputs by name, of a model without a cache
        .session(level, backend=)           to run it step by step
        .verify() -> Verified               .ok, .report: every level against the export
        .plan() -> Planned                  as below, of what is compiled
    plan(source, target=, memory=) -> Planned   .total, .fits, .plan: memory, steps, bounds
    InputError, CheckError (OmforgeError)   .what, .why, .next_step

A model is a path (a file, or an export's folder), an `onnx.ModelProto`, an `onnx_ir.Model` or a
`torch.onnx.ONNXProgram`, and stays as it is unless `inplace=True` is said. Results have
`to_json()`, a plain `str()` and a form for notebooks. Passes, targets and backends of one's own are
in docs/plugins.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from omforge.api.bundle import Bundle, Generated, Verified
    from omforge.api.checking import Checked, check
    from omforge.api.compiling import compile
    from omforge.api.models import load
    from omforge.api.planning import Planned, plan
    from omforge.api.raising import Pipeline, Rewritten, raise_
    from omforge.ir.errors import CheckError, InputError, OmforgeError

__all__ = [
    "Bundle",
    "CheckError",
    "Checked",
    "Generated",
    "InputError",
    "OmforgeError",
    "Pipeline",
    "Planned",
    "Rewritten",
    "Verified",
    "__version__",
    "check",
    "compile",
    "load",
    "plan",
    "raise_",
]

_WHERE = {
    "Bundle": "api.bundle",
    "Generated": "api.bundle",
    "Verified": "api.bundle",
    "Checked": "api.checking",
    "check": "api.checking",
    "compile": "api.compiling",
    "load": "api.models",
    "Planned": "api.planning",
    "plan": "api.planning",
    "Pipeline": "api.raising",
    "Rewritten": "api.raising",
    "raise_": "api.raising",
    "CheckError": "ir.errors",
    "InputError": "ir.errors",
    "OmforgeError": "ir.errors",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: `import omforge` itself costs nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module 'omforge' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"omforge.{_WHERE[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
