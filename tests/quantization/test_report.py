"""What was quantised is kept with the model."""

from omforge import ir
from omforge.quantization.report import (
    BudgetPlan,
    Candidate,
    PlannedLayer,
    QuantizedLayer,
    add_layers,
    budget_plan,
    keep_plan,
    quantized_layers,
)


def test_layers_add_up() -> None:
    model = ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
    g (float x) => (float y) { y = Relu (x) }""")
    assert quantized_layers(model) == ()
    layers = [
        QuantizedLayer(name, (64, 8), 4, 32, True, "rtn", 1024, 288, False) for name in ("a", "b")
    ]
    add_layers(model, layers[:1])
    add_layers(model, layers[1:])
    assert quantized_layers(model) == tuple(layers)


def test_a_plan_counts_kinds_and_names_the_most_sensitive_layers() -> None:
    model = ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
    g (float x) => (float y) { y = Relu (x) }""")
    assert budget_plan(model) is None
    layers = tuple(
        PlannedLayer(
            name,
            name,
            chosen,
            (Candidate("int4:g32", 10, cost, 0.1, None), Candidate("int8", 20, 0.0, 0.0, None)),
        )
        for name, chosen, cost in (("a", "int8", 0.5), ("b", "int8", 2.0), ("c", "int8", 0.5))
    )
    plan = BudgetPlan(100, 60, 30, 60, "weights", 0.0, 0.0, layers)
    keep_plan(model, plan)
    assert budget_plan(model) == plan
    assert plan.counts == {"int4:g32": 0, "int8": 3}
    assert [layer.name for layer in plan.most_sensitive] == ["b", "a", "c"]
