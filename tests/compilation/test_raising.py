"""What the stage `raise` refuses: operators that nobody knows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from omforge import ir
from omforge.compilation.insertion import parse_insertion
from omforge.compilation.options import CompileOptions
from omforge.compilation.raising import Raised
from omforge.compilation.request import Request
from omforge.compilation.stages import run_stages
from tests.exports import export

OPTIONS = CompileOptions("Ascend910B4", context=32, prefill=(8,))
SWAP = """
from dataclasses import dataclass

from omforge import ir
from omforge.passes import Pass


@dataclass(frozen=True)
class Plain(Pass):
    name = "plain-sigmoid"

    def run(self, model: ir.Model) -> int:
        found = [node for node in model.graph if node.domain == "com.acme"]
        for node in found:
            node.domain, node.op_type = "", "Sigmoid"
        return len(found)
"""

Edited = Callable[[str], Request]


@pytest.fixture
def with_domain(tmp_path: Path) -> Edited:
    """An export whose sigmoids, one a layer, are operators of somebody else's."""

    def edited(domain: str, op_type: str = "FastSigmoid") -> Request:
        source = export("optimum", "llama_gqa", tmp_path / "export")
        model = ir.load(source)
        for node in model.graph:
            if node.op_type == "Sigmoid":
                node.domain, node.op_type = domain, op_type
                node.outputs[0].shape = None
        model.graph.opset_imports[domain] = 1
        ir.save(model, source)
        return Request(source, tmp_path / "bundle", OPTIONS)

    return edited


def test_a_custom_operator_is_named(with_domain: Edited) -> None:
    with pytest.raises(ir.CheckError) as refused:
        run_stages(with_domain("com.acme"), until="raise")
    error = refused.value
    assert error.what == "omforge does not know the operator FastSigmoid of domain com.acme"
    assert "com.acme.FastSigmoid /model/layers.0/mlp" in error.why
    assert "and 1 more" in error.why
    assert "--insert-pass before=raise-contrib-ops:PASS" in error.next_step


def test_a_custom_operator_is_replaced_as_its_error_says(
    with_domain: Edited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme_swap.py").write_text(SWAP)
    monkeypatch.syspath_prepend(tmp_path)
    insert = (parse_insertion("before=raise-contrib-ops:acme_swap:Plain"),)
    request = with_domain("com.acme")
    options = dataclasses.replace(request.options, insert=insert)
    raised = run_stages(dataclasses.replace(request, options=options), until="raise")
    assert isinstance(raised, Raised)
    assert raised.coverage.complete
