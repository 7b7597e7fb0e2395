"""Illegal in what a file holds: names, edges, slots, attributes, constants, dtypes, caches."""

from dataclasses import replace

from omforge.air import graph
from omforge.air.graph import Attr, Desc
from omforge.air.names import naming
from tests.lowering.air_legality.graphs import (
    UNFED,
    added,
    described,
    edit,
    fed,
    renamed,
    told,
    without,
)
from tests.lowering.air_legality.illegal_parts import (
    Illegal,
    constant,
    controlled,
    data_index,
    reader,
    spare_input,
    stored_value,
    twice,
    view,
    writer_behind,
)

FILE = (
    Illegal("air-version", "version 3", "layer", lambda air: replace(air, version=3)),
    Illegal(
        "air-graph-names",
        "two graphs of one name",
        "layer",
        lambda air: replace(air, graphs=(*air.graphs, *air.graphs)),
    ),
    Illegal("air-names-unique", "an operator twice", "layer", lambda air: twice(air, "gamma")),
    Illegal(
        "air-names-unique",
        "an operator without a name",
        "layer",
        lambda air: added(air, replace(air.graph.by_name()["gamma"], name="")),
    ),
)

EDGES = (
    Illegal(
        "air-edges",
        "an input of the graph that is not there",
        "layer",
        lambda air: replace(air, graphs=(replace(air.graph, inputs=("nobody:0",)),)),
    ),
    Illegal(
        "air-edges",
        "a producer that is not there",
        "layer",
        lambda air: edit(air, "cast", lambda op: replace(op, inputs=("summ:0",))),
    ),
    Illegal(
        "air-edges",
        "an output that is not there",
        "layer",
        lambda air: edit(air, "cast", lambda op: replace(op, inputs=("sum:1",))),
    ),
    Illegal(
        "air-edges",
        "a control edge from nothing",
        "layer",
        lambda air: controlled(air, "cast", "nobody"),
    ),
    Illegal(
        "air-no-cycles",
        "two wait for each other",
        "layer",
        lambda air: controlled(air, "norm", "sum"),
    ),
    Illegal(
        "air-no-cycles",
        "one waits for itself",
        "layer",
        lambda air: controlled(air, "norm", "norm"),
    ),
    Illegal(
        "air-input-descs",
        "NetOutput describes none of its inputs",
        "layer",
        lambda air: edit(air, "NetOutput", lambda op: replace(op, input_desc=op.input_desc[:0])),
    ),
    Illegal(
        "air-desc-agrees",
        "a reader describes another shape",
        "layer",
        lambda air: edit(
            air, "cast", lambda op: replace(op, input_desc=(Desc("x", "float16", (1, 4, 32)),))
        ),
    ),
    Illegal(
        "air-desc-agrees",
        "a slot is connected and described as left out",
        "layer",
        lambda air: edit(air, "cast", lambda op: replace(op, input_desc=(UNFED,))),
    ),
)

INTERFACE = (
    Illegal("air-indices", "an index is missing", "layer", lambda air: data_index(air, "x", 1)),
    Illegal("air-indices", "an index twice", "decode", lambda air: data_index(air, "k", 0)),
    Illegal(
        "air-refdata-last",
        "a RefData before a Data",
        "decode",
        lambda air: data_index(data_index(air, "k_cache", 4), "mask", 5),
    ),
    Illegal(
        "air-data-desc",
        "x and y differ",
        "layer",
        lambda air: edit(
            air, "x", lambda op: replace(op, input_desc=(Desc("x", "float16", (1, 4, 32)),))
        ),
    ),
    Illegal(
        "air-data-desc",
        "an input without a shape",
        "layer",
        lambda air: described(air, "x", shape=None),
    ),
    Illegal("air-input-dims", "a dim of 0", "layer", lambda air: added(air, spare_input("float16", 0))),
    Illegal(
        "air-input-dims",
        "a cache of a size that is not known",
        "decode",
        lambda air: described(
            described(air, "k_cache", shape=(1, 4, -1, 64)), "write_k", shape=(1, 4, -1, 64)
        ),
        gears=True,
    ),
    Illegal("air-net-output", "no NetOutput", "layer", lambda air: without(air, "NetOutput")),
    Illegal("air-has-inputs", "no input", "layer", lambda air: constant(air, "x")),
    Illegal(
        "air-net-output",
        "an output that is not connected",
        "layer",
        lambda air: fed(air, "NetOutput", 0, ""),
    ),
    Illegal(
        "air-net-output",
        "its inputs have other names",
        "layer",
        lambda air: renamed(air, "NetOutput", "_input_name_key", "x"),
    ),
    Illegal(
        "air-input-names",
        "an input's name with a colon",
        "layer",
        lambda air: added(
            air, replace(air.graph.by_name()["x"], name="a:b", attributes={"index": graph.integer(1), **naming(("x",), ("y",))})
        ),
    ),
)  # fmt: skip

SLOTS = (
    Illegal(
        "air-op-known",
        "an operator that GE has not",
        "layer",
        lambda air: edit(air, "norm", lambda op: replace(op, type="RMSNorm")),
    ),
    Illegal(
        "air-op-release",
        "an operator newer than 8.1",
        "layer",
        lambda air: edit(air, "norm", lambda op: replace(op, type="ScatterPaKvCache")),
    ),
    Illegal(
        "air-slot-names",
        "no names",
        "layer",
        lambda air: told(air, "norm", _input_name_key=None),
    ),
    Illegal(
        "air-slot-names",
        "names in another order",
        "layer",
        lambda air: renamed(air, "norm", "_input_name_key", "gamma", "x"),
    ),
    Illegal(
        "air-slot-names",
        "a dynamic input without its number",
        "decode",
        lambda air: renamed(air, "attention", "_input_name_key", "query", "key", "value0"),
    ),
    Illegal(
        "air-slot-names",
        "an optional input in the middle is not among them",
        "decode",
        lambda air: edit(
            air,
            "attention",
            lambda op: replace(
                op,
                inputs=op.inputs[:3] + op.inputs[4:],
                input_desc=op.input_desc[:3] + op.input_desc[4:],
                attributes={
                    **op.attributes,
                    **{
                        k: replace(
                            op.attributes[k],
                            items=op.attributes[k].items[:3] + op.attributes[k].items[4:],
                        )
                        for k in ("_input_name_key",)
                    },
                    "_input_name_value": replace(
                        op.attributes["_input_name_value"],
                        items=op.attributes["_input_name_value"].items[:-1],
                    ),
                },
            ),
        ),
    ),
    Illegal(
        "air-output-slots",
        "an output that is not described",
        "layer",
        lambda air: edit(
            air,
            "norm",
            lambda op: replace(
                op,
                output_desc=op.output_desc[:1],
                attributes={**op.attributes, **naming(("x", "gamma"), ("y",))},
            ),
        ),
    ),
    Illegal("air-required-inputs", "a required input left out", "layer", lambda air: fed(air, "norm", 1, "")),
    Illegal(
        "air-required-inputs",
        "a member of a dynamic input left out",
        "decode",
        lambda air: fed(air, "attention", 2, ""),
    ),
    Illegal(
        "air-optional-inputs",
        "an input left out, and described",
        "decode",
        lambda air: edit(
            air,
            "attention",
            lambda op: replace(
                op,
                input_desc=(
                    *op.input_desc[:3],
                    Desc("pse_shift", "float16", (1, 4, 1, 256)),
                    *op.input_desc[4:],
                ),
            ),
        ),
    ),
)  # fmt: skip

ATTRIBUTES = (
    Illegal("air-required-attributes", "num_heads missing", "decode", lambda air: told(air, "attention", num_heads=None)),
    Illegal("air-required-attributes", "reduce missing", "decode", lambda air: told(air, "write_k", reduce=None)),
    Illegal("air-attribute-kinds", "a float as int", "layer", lambda air: told(air, "norm", epsilon=graph.integer(0))),
    Illegal("air-attribute-kinds", "a bool as int", "layer", lambda air: told(air, "product", transpose_x1=graph.integer(0))),
    Illegal("air-attribute-kinds", "an int as dtype", "layer", lambda air: told(air, "cast", dst_type=graph.dtype("float32"))),
    Illegal("air-attribute-kinds", "no value", "layer", lambda air: told(air, "norm", epsilon=Attr("none"))),
    Illegal("air-list-types", "a list without val_type", "layer", lambda air: told(air, "norm", _mine=Attr("i", items=(1,), typed=False))),
    Illegal("air-list-types", "a description's list without val_type", "layer", lambda air: edit(air, "norm", lambda op: replace(op, input_desc=(replace(op.input_desc[0], attributes={"origin_shape": Attr("i", items=(1, 4, 64), typed=False)}), *op.input_desc[1:])))),
    Illegal("air-attribute-dtypes", "a number of ge.proto.DataType", "layer", lambda air: told(air, "cast", dst_type=1)),
    Illegal("air-attribute-dtypes", "a number that is no dtype", "layer", lambda air: told(air, "cast", dst_type=99)),
    Illegal("air-attribute-values", "a reduction that the kernel has not", "decode", lambda air: told(air, "write_k", reduce="add")),
    Illegal("air-attributes-read", "an attribute of another operator", "layer", lambda air: told(air, "norm", axis=-1)),
    Illegal("air-ir-attributes", "what GE recovers is written in another order", "layer", lambda air: told(air, "norm", _ir_inputs_key=graph.texts(("gamma", "x"), typed=False))),
)  # fmt: skip

CONSTANTS = (
    Illegal("air-const-value", "no value", "layer", lambda air: told(air, "gamma", value=None)),
    Illegal("air-const-value", "a value of another kind", "layer", lambda air: told(air, "gamma", value=graph.integer(1))),
    Illegal("air-const-value", "a constant that reads", "layer", lambda air: edit(air, "gamma", lambda op: replace(op, inputs=("x:-1",)))),
    Illegal("air-const-bytes", "half of its bytes", "layer", lambda air: told(air, "gamma", value=stored_value(Desc("", "float16", (64,)), bytes(64)))),
    Illegal("air-const-bytes", "a dtype without a size", "layer", lambda air: described(told(air, "gamma", value=stored_value(Desc("", "undefined", (64,)), b"")), "gamma", dtype="undefined")),
    Illegal("air-const-desc", "an output of another shape", "layer", lambda air: told(air, "gamma", value=stored_value(Desc("", "float16", (8, 8)), bytes(128)))),
    Illegal("air-weight-attributes", "dtype as a number", "layer", lambda air: told(air, "weight", dtype=graph.integer(1))),
    Illegal("air-weight-attributes", "no path", "layer", lambda air: told(air, "weight", location=None)),
    Illegal("air-weight-attributes", "two paths", "layer", lambda air: told(air, "weight", file_path=graph.text("weights.bin"))),
    Illegal("air-weight-attributes", "a shape without val_type", "layer", lambda air: told(air, "weight", shape=Attr("i", items=(64, 64), typed=False))),
    Illegal("air-weight-files", "a file that is not there", "layer", lambda air: told(air, "weight", location="other.bin")),
    Illegal("air-weight-files", "an offset behind its end", "layer", lambda air: told(air, "weight", offset=8000)),
    Illegal("air-weight-files", "a negative offset", "layer", lambda air: told(air, "weight", offset=-2)),
    Illegal("air-weight-bytes", "a length of half of it", "layer", lambda air: told(air, "weight", length=4096)),
)  # fmt: skip


KERNELS = (
    Illegal("air-target-dtypes", "bfloat16 on 310P", "layer", lambda air: described(air, "x", dtype="bfloat16")),
    Illegal("air-op-release", "a kernel newer than 8.1 on 310P", "turned", lambda air: air),
    Illegal("air-kernel", "a fused operator on 310B", "decode", lambda air: air, "Ascend310B4"),
    Illegal("air-kernel-inferred", "an operator that 950 lost", "decode", lambda air: air, "Ascend910_95"),
    Illegal("air-dtypes", "float32 queries", "decode", lambda air: described(described(air, "q", dtype="float32"), "attention", dtype="float32")),
    Illegal("air-dtypes", "an int32 mask", "decode", lambda air: described(air, "mask", dtype="int32")),
    Illegal("air-formats", "weights in a format of convolutions", "experts", lambda air: described(edit(air, "nz", lambda op: replace(op, type="Identity", attributes=naming(("x",), ("y",)))), "nz", layout="FRACTAL_Z")),
    Illegal("air-formats", "weights of 310P in ND", "experts", lambda air: fed(air, "product", 1, "w:0")),
    Illegal("air-prototype-dtypes", "an operator without a table", "layer", lambda air: added(air, replace(reader("odd", "rows:0", "int64", 2), type="Erfinv", attributes=naming(("input_x",), ("output_y",))))),
    Illegal("air-dtypes-inferred", "int32 into a norm on 950", "layer", lambda air: described(air, "x", dtype="int32"), "Ascend910_95"),
)  # fmt: skip


CACHES = (
    Illegal("air-ref-const", "a constant is written", "decode", lambda air: constant(told(air, "v_cache", index=5), "k_cache")),
    Illegal("air-ref-data", "a Data is written", "decode", lambda air: edit(air, "k_cache", lambda op: replace(op, type="Data"))),
    Illegal("air-ref-view", "a reshaped RefData is written", "decode", lambda air: fed(added(air, view("k_cache")), "write_k", 0, "view:0")),
    Illegal("air-ref-order", "a reader beside the writer", "decode", lambda air: added(air, reader("peek", "k_cache:0", "float16", 1, 4, 256, 64))),
    Illegal("air-ref-order", "two writers without an order", "decode", lambda air: added(air, replace(air.graph.by_name()["write_k"], name="write_again"))),
    Illegal("air-ref-order", "a second writer beside the first's reader", "decode", lambda air: added(air, writer_behind("write_k"))),
    Illegal("air-ref-output", "a written cache is an output", "decode", lambda air: fed(air, "NetOutput", 0, "write_k:0")),
    Illegal("air-ref-output", "a cache is an output", "decode", lambda air: fed(air, "NetOutput", 0, "k_cache:0")),
    Illegal("air-ref-written", "nothing writes a RefData", "decode", lambda air: fed(without(air, "write_k"), "attention", 1, "k_cache:0")),
)  # fmt: skip

STRUCTURE: tuple[Illegal, ...] = (
    *FILE, *EDGES, *INTERFACE, *SLOTS, *ATTRIBUTES, *CONSTANTS, *KERNELS, *CACHES,
)  # fmt: skip
