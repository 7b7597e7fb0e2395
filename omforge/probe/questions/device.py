"""The device itself: copies, weights and workspaces that are shared, numerics, and speed."""

from __future__ import annotations

import numpy as np

from omforge.probe.onnx_models import exact as wide
from omforge.probe.onnx_models import matmul, model, node, numbers
from omforge.probe.questions.controls import ATC, DEVICE
from omforge.probe.record import (
    FAILS,
    MEASURED,
    REFUSED,
    RIGHT,
    WRONG,
    Array,
    Build,
    Experiment,
    Probe,
    Step,
    fill,
    load,
    once,
    room,
    run,
    timed,
)

_EXTERNAL = ("--precision_mode_v2=origin", "--external_weight=1")


def _two_readers() -> tuple[tuple[Build, ...], Array]:
    """Two models of different shapes, with one constant: prefill and decode."""
    first, weight = matmul(rows=16)
    second, _ = matmul(rows=1)
    return (Build("prefill", first, _EXTERNAL), Build("decode", second, _EXTERNAL)), weight


def _weight_files(_: str) -> Experiment:
    builds, _weight = _two_readers()
    counts = {1: "one", 2: "two"}
    return Experiment(builds, count="weight/weight_*", counts=counts)


def _loaded(how: str) -> Experiment:
    builds, weight = _two_readers()
    x, z = numbers(16, 64, seed=1), numbers(1, 64, seed=2)
    return Experiment(
        builds,
        (
            *load("prefill", "decode", how=how),
            *fill(x=x, z=z),
            run("prefill", ("x",), ("y",)),
            run("decode", ("z",), ("w",)),
        ),
        {
            RIGHT: {
                "y": (wide(x) @ wide(weight)).astype(np.float16),
                "w": (wide(z) @ wide(weight)).astype(np.float16),
            }
        },
    )


def _copy_2d(_: str) -> Experiment:
    """Two rows of 64 bytes, 128 apart, to places 256 apart."""
    source = (np.arange(256) % 251).astype(np.uint8)
    wanted = np.zeros(512, np.uint8)
    wanted[:64], wanted[256:320] = source[:64], source[128:192]
    step = Step(
        "copy2d",
        {"to": "to", "to_pitch": 256, "from": "from", "from_pitch": 128, "width": 64, "rows": 2},
    )
    steps = (*fill(**{"from": source, "to": np.zeros(512, np.uint8)}), step)
    return Experiment((), steps, {RIGHT: {"to": wanted}}, atol=0.5)


def _unaligned(_: str) -> Experiment:
    source = (np.arange(64) % 251).astype(np.uint8)
    wanted = np.zeros(256, np.uint8)
    wanted[34:98] = source
    step = Step("copy", {"to": "to", "from": "from", "offset": 34, "bytes": 64})
    steps = (*fill(**{"from": source, "to": np.zeros(256, np.uint8)}), step)
    return Experiment((), steps, {RIGHT: {"to": wanted}}, atol=0.5)


def _again(_: str) -> Experiment:
    made, weight = matmul()
    x = numbers(16, 64, seed=1)
    return Experiment(
        (Build("model", made),),
        (
            *load("model"),
            *fill(x=x),
            run("model", ("x",), ("y",)),
            Step("again"),
            *load("model"),
            *fill(x=x),
            run("model", ("x",), ("y",)),
        ),
        {RIGHT: {"y": (wide(x) @ wide(weight)).astype(np.float16)}},
    )


def _overflow(_: str) -> Experiment:
    spec = ("float16", (4, 64))
    made = model([node("Mul", ["x", "x"], ["y"])], {"x": spec}, {"y": spec})
    x = np.full((4, 64), 300, np.float16)
    infinite, most = np.full_like(x, np.inf), np.full_like(x, 65504)
    return once(made, {"x": x}, x, values={"infinite": infinite, "saturates": most})


def _sum_of_ones(_: str) -> Experiment:
    """4,096 products of 1: a sum in float16 does not get beyond 2,048."""
    made = model(
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": ("float16", (16, 4096)), "w": ("float16", (4096, 16))},
        {"y": ("float16", (16, 16))},
    )
    x, w = np.ones((16, 4096), np.float16), np.ones((4096, 16), np.float16)
    values = {
        "float32": np.full((16, 16), 4096, np.float16),
        "float16": np.full((16, 16), 2048, np.float16),
    }
    return once(made, {"x": x, "w": w}, x, values=values, rtol=1e-3, atol=0)


def _softmax_sum(_: str) -> Experiment:
    spec = ("float16", (16, 4096))
    made = model([node("Softmax", ["x"], ["y"], axis=-1)], {"x": spec}, {"y": spec})
    x = np.zeros((16, 4096), np.float16)
    values = {
        "float32": np.full_like(x, 1 / 4096),
        "float16": np.full_like(x, 1 / 2048),
    }
    return once(made, {"x": x}, x, values=values, rtol=1e-2, atol=0)


_MIB = 1 << 20


def _workspace(_: str) -> Experiment:
    """Three tensors of 8 MiB live at once, of five: reuse is seen by the figure."""
    spec = ("float16", (1024, 4096))
    made = model(
        [
            node("Add", ["x", "x"], ["a"]),
            node("Mul", ["a", "x"], ["b"]),
            node("Add", ["a", "b"], ["c"]),
            node("Mul", ["c", "b"], ["y"]),
        ],
        {"x": spec},
        {"y": spec},
    )
    return Experiment((Build("model", made),), (Step("size", {"model": "model"}),), unit="bytes")


def _weight_product(family: str) -> Experiment:
    """One row by 64 MiB of int8; the weight is an input, so that the kit stays small."""
    inner, columns = 4096, 16384
    if family == "310b":  # no kernel: the float16 product takes its place
        made = model(
            [node("MatMul", ["x", "w"], ["y"])],
            {"x": ("float16", (1, inner)), "w": ("float16", (inner, columns // 2))},
            {"y": ("float16", (1, columns // 2))},
        )
        moved = inner * columns
    else:
        made = model(
            [
                node("Transpose", ["w"], ["wt"], perm=[1, 0]),
                node("NPUWeightQuantBatchMatmulV2", ["x", "wt", "scale"], ["y"]),
            ],
            {"x": ("float16", (1, inner)), "w": ("int8", (columns, inner))},
            {"y": ("float16", (1, columns))},
            {"scale": np.full(columns, 1 / 128, np.float16)},
        )
        moved = inner * columns
    steps = (
        *load("model"),
        room("x", 2 * inner),
        room("w", moved),
        timed("model", ("x", "w"), ("y",), moved),
    )
    return Experiment((Build("model", made),), steps, unit="GB/s")


def _cache_read(_: str) -> Experiment:
    """One token's scores over 64 MiB of keys."""
    heads, keys, head = 32, 8192, 128
    made = model(
        [node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]), node("MatMul", ["q", "kt"], ["y"])],
        {"q": ("float16", (1, heads, 1, head)), "k": ("float16", (1, heads, keys, head))},
        {"y": ("float16", (1, heads, 1, keys))},
    )
    moved = 2 * heads * keys * head
    steps = (
        *load("model"),
        room("q", 2 * heads * head),
        room("k", moved),
        timed("model", ("q", "k"), ("y",), moved),
    )
    return Experiment((Build("model", made),), steps, unit="GB/s")


def _launch(_: str) -> Experiment:
    made, _weight = matmul()
    steps = (*load("model"), room("x", 2 * 16 * 64), timed("model", ("x",), ("y",)))
    return Experiment((Build("model", made),), steps, unit="microseconds a run")


_AFTER = (ATC, DEVICE)
_FIGURE = {MEASURED: "a figure for the planner"}
_SUMS = {
    "float32": "sums are kept in float32",
    "float16": "sums are kept in float16: long sums lose what is small",
    WRONG: "something between the two: see the evidence",
    FAILS: "it does not run",
    REFUSED: "atc refuses it",
}

PROBES = (
    Probe(
        "weight-files",
        "Do two .om with equal constants have one weights file?",
        _weight_files,
        {
            "one": "they have, as its name is a hash: buckets share it on disk",
            "two": "they have not: each bucket has its own",
            REFUSED: "atc refuses --external_weight=1",
        },
        expected="one",
        after=(ATC,),
        settles="the bytes of a bundle's .om files",
    ),
    Probe(
        "weights-by-pyacl",
        "Can pyACL load models whose weights are on the device already?",
        lambda _: _loaded("weights"),
        {
            RIGHT: "it can: AclOptions.share_weights `auto` shares them",
            WRONG: "the numbers are others: share_weights must be `no`",
            FAILS: "it cannot: the models load their own, or share_weights is `ctypes`",
            REFUSED: "atc refuses --external_weight=1",
        },
        after=_AFTER,
        settles="AclOptions.share_weights",
    ),
    Probe(
        "one-workspace",
        "May two models in one stream have one workspace, as large as the larger needs?",
        lambda _: _loaded("workspace"),
        {
            RIGHT: "they may, as omforge does it",
            WRONG: "they may not: AclOptions.share_workspace must be False",
            FAILS: "they may not: AclOptions.share_workspace must be False",
            REFUSED: "atc refuses --external_weight=1",
        },
        expected=RIGHT,
        after=_AFTER,
        settles="AclOptions.share_workspace",
    ),
    Probe(
        "copy-2d-within-device",
        "Does acl.rt.memcpy2d_async copy within the device?",
        _copy_2d,
        {
            RIGHT: "it does: AclOptions.kv_copy may be `2d`",
            WRONG: "it copies something else: kv_copy must be `rows`",
            FAILS: "it does not: kv_copy is `rows`",
        },
        refused="",
        after=(DEVICE,),
        settles="AclOptions.kv_copy",
    ),
    Probe(
        "copy-unaligned",
        "May a copy within the device go to an address that is no multiple of 64?",
        _unaligned,
        {
            RIGHT: "it may: heads of any size can be copied by row",
            WRONG: "it copies something else: heads have to be of 32 and more",
            FAILS: "it may not: heads have to be of 32 and more",
        },
        refused="",
        after=(DEVICE,),
        settles="the least head size of a cache that is copied",
    ),
    Probe(
        "init-after-finalize",
        "May acl.init follow acl.finalize in one process?",
        _again,
        {
            RIGHT: "it may: a process may open one bundle after another",
            WRONG: "it may not",
            FAILS: "it may not: one bundle for each process",
            REFUSED: "atc refuses the model",
        },
        expected=RIGHT,
        after=_AFTER,
        settles="how many bundles a process may open",
    ),
    Probe(
        "float16-overflow",
        "Is 300 * 300 infinite in float16, or the largest number?",
        _overflow,
        {
            "infinite": "as on the CPU: what verify saw holds",
            "saturates": "the largest number: infinities of the CPU do not appear",
            WRONG: "something else",
            FAILS: "it does not run",
            REFUSED: "atc refuses it",
        },
        after=_AFTER,
        settles="what an overflow does",
    ),
    Probe(
        "matmul-accumulation",
        "In what are the sums of a float16 MatMul kept?",
        _sum_of_ones,
        _SUMS,
        expected="float32",
        after=_AFTER,
        settles="the tolerance of products",
    ),
    Probe(
        "softmax-accumulation",
        "In what are the sums of a float16 Softmax kept?",
        _softmax_sum,
        _SUMS,
        expected="float32",
        after=_AFTER,
        settles="the tolerance of attention over long texts",
    ),
    Probe(
        "workspace",
        "How large is the workspace of four elementwise operators on 8 MiB?",
        _workspace,
        {MEASURED: "bytes; 16 MiB and less where memory is used again"},
        refused="",
        failed="",
        after=_AFTER,
        settles="the memory that a bundle needs",
    ),
    Probe(
        "bandwidth-of-weights",
        "At what bandwidth does a product read integer weights?",
        _weight_product,
        _FIGURE,
        refused="",
        failed="",
        after=_AFTER,
        settles="the planner: bytes of weights to seconds",
    ),
    Probe(
        "bandwidth-of-cache",
        "At what bandwidth does attention read keys?",
        _cache_read,
        _FIGURE,
        refused="",
        failed="",
        after=_AFTER,
        settles="the planner: bytes of cache to seconds",
    ),
    Probe(
        "launch",
        "What does a run cost that moves next to nothing?",
        _launch,
        _FIGURE,
        refused="",
        failed="",
        after=_AFTER,
        settles="the planner: the least of a step",
    ),
)
