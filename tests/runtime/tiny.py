"""A two-layer language model small enough to write down: as a bundle, as an export, and in numpy.

V=32, hidden 16, N=4 query heads, K=2 kv heads, D=4. Positions are learned. Each layer has a window
or None; layers of one kind share a mask.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

from omforge import ir
from omforge.bundle.manifest import (
    SCHEMA_VERSION,
    Bucket,
    Export,
    KvCache,
    Manifest,
    MaskSpec,
    ModelFacts,
    TensorSpec,
    sealed,
)
from omforge.ir.dims import evaluate, parse_dim
from omforge.ir.files import save
from omforge.ir.weights import WeightWriter
from omforge.om.simulated import simulate_om
from omforge.runtime.bundle import Bundle

LAYERS, VOCABULARY, HIDDEN, HEADS, KV_HEADS, HEAD = 2, 32, 16, 4, 2, 4
POSITIONS = 40
EOS = 15  # no text of the tests comes to it
ONNX_NAMES = {"float32": "float", "float16": "float16"}


@dataclass(frozen=True)
class Tiny:
    """What the bundle is built for."""

    windows: tuple[int | None, int | None] = (None, None)
    batches: tuple[int, ...] = (1,)
    prefill: tuple[int, ...] = (4, 8)
    capacity: int = 24
    layout: str = "stacked"
    dtype: str = "float32"
    gears: bool = False  # one graph with a gear for each length, in place of one for each
    om: bool = False  # with the .om files of a simulated atc

    @property
    def masks(self) -> tuple[MaskSpec, ...]:
        kinds = sorted(set(self.windows), key=lambda window: window or 0)
        return tuple(MaskSpec(mask_name(window), window) for window in kinds)


def mask_name(window: int | None) -> str:
    return "attention_mask" if window is None else f"attention_mask_w{window}"


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)

    def matrix(*shape: int) -> np.ndarray:
        return (0.3 * random.standard_normal(shape)).astype(np.float32)

    found = {
        "embedding": 3 * matrix(VOCABULARY, HIDDEN),
        "positions": matrix(POSITIONS, HIDDEN),
        "head": matrix(HIDDEN, VOCABULARY),
        "half": np.float32(0.5),  # the lowered graph's attention scale
    }
    for layer in range(LAYERS):
        found |= {
            f"gamma{layer}": 1 + matrix(HIDDEN),
            f"wq{layer}": matrix(HIDDEN, HEADS * HEAD),
            f"wk{layer}": matrix(HIDDEN, KV_HEADS * HEAD),
            f"wv{layer}": matrix(HIDDEN, KV_HEADS * HEAD),
            f"wo{layer}": matrix(HEADS * HEAD, HIDDEN),
        }
    return found


def reference_logits(tokens: list[int], windows: tuple[int | None, ...]) -> np.ndarray:
    """Logits [S, V] of the whole text at once: no cache, no padding, no buckets."""
    w = weights()
    seq = len(tokens)
    x = w["embedding"][tokens] + w["positions"][:seq]
    back = np.arange(seq)[:, None] - np.arange(seq)
    for layer, window in enumerate(windows):
        normal = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w[f"gamma{layer}"]
        q, k, v = (
            (normal @ w[f"w{name}{layer}"]).reshape(seq, -1, HEAD).transpose(1, 0, 2)
            for name in "qkv"
        )
        k, v = (part.repeat(HEADS // KV_HEADS, axis=0) for part in (k, v))
        scores = 0.5 * q @ k.transpose(0, 2, 1)
        hidden = (back < 0) | (back >= (window or seq + 1))
        share = np.exp(np.where(hidden, -np.inf, scores - scores.max(-1, keepdims=True)))
        y = (share / share.sum(-1, keepdims=True)) @ v
        x = x + y.transpose(1, 0, 2).reshape(seq, -1) @ w[f"wo{layer}"]
    return x @ w["head"]


def cache_names(layout: str) -> tuple[list[str], list[str]]:
    if layout == "stacked":
        return ["past_key_values"], ["present_key_values"]
    pairs = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    return [f"past_key_values.{pair}" for pair in pairs], [f"present.{pair}" for pair in pairs]


def interface(
    tiny: Tiny, batch: int | str, seq: int | str, capacity: int | str, *, integer: str, dtype: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The bucket interface; symbols where the canonical graph has them."""
    dynamic = isinstance(batch, str)
    rows: int | str = "rows" if dynamic else batch
    cached: int | str = batch if tiny.layout == "per-layer" else "stack"
    if not dynamic and tiny.layout == "stacked":
        cached = 2 * LAYERS * batch
    total: int | str = "total" if dynamic else f"{capacity} + seq"
    if isinstance(seq, int) and isinstance(capacity, int):
        total = capacity + seq
    past, present = cache_names(tiny.layout)
    inputs = (
        TensorSpec("input_ids", integer, (batch, seq)),
        TensorSpec("position_ids", integer, (batch, seq)),
        TensorSpec("logits_index", integer, (rows,)),
        *(TensorSpec(mask.name, dtype, (batch, 1, seq, total)) for mask in tiny.masks),
        *(TensorSpec(name, dtype, (cached, KV_HEADS, capacity, HEAD)) for name in past),
    )
    outputs = (
        TensorSpec("logits", dtype, (rows, VOCABULARY)),
        *(TensorSpec(name, dtype, (cached, KV_HEADS, seq, HEAD)) for name in present),
    )
    return inputs, outputs


def text(specs: tuple[TensorSpec, ...]) -> str:
    parts = []
    for spec in specs:
        name = spec.name if "." not in spec.name else f'"{spec.name}"'
        dims = ", ".join(f'"{dim}"' if " " in str(dim) else str(dim) for dim in spec.shape)
        parts.append(f"{ONNX_NAMES.get(spec.dtype, spec.dtype)}[{dims}] {name}")
    return ", ".join(parts)


def ends(tiny: Tiny) -> tuple[str, str]:
    """The lines that take the cache apart into k0, v0, k1, v1, and put the new parts together."""
    past, present = cache_names(tiny.layout)
    parts, new = ["k0", "v0", "k1", "v1"], ["nk0", "nv0", "nk1", "nv1"]
    if tiny.layout == "stacked":
        split = f"{', '.join(parts)} = Split <axis = 0 SPLIT> (past_key_values)"
        return split, f"present_key_values = Concat <axis = 0> ({', '.join(new)})"
    lines = [f'{part} = Identity ("{name}")' for part, name in zip(parts, past, strict=True)]
    news = [f'"{name}" = Identity ({part})' for part, name in zip(new, present, strict=True)]
    return "\n".join(lines), "\n".join(news)


def canonical_graph(tiny: Tiny) -> onnx.ModelProto:
    inputs, outputs = interface(tiny, "batch", "seq", "capacity", integer="int64", dtype="float32")
    split, join = ends(tiny)
    layers = ""
    for layer, window in enumerate(tiny.windows):
        layers += f"""
            n{layer} = RMSNormalization <axis = -1, epsilon = 1e-6> (x{layer}, gamma{layer})
            q{layer} = MatMul (n{layer}, wq{layer})
            key{layer} = MatMul (n{layer}, wk{layer})
            value{layer} = MatMul (n{layer}, wv{layer})
            y{layer}, unused_k{layer}, unused_v{layer} =
                Attention <q_num_heads = {HEADS}, kv_num_heads = {KV_HEADS}, scale = 0.5>
                (q{layer}, key{layer}, value{layer}, {mask_name(window)}, k{layer}, v{layer})
            o{layer} = MatMul (y{layer}, wo{layer})
            x{layer + 1} = Add (x{layer}, o{layer})
            key4d{layer} = Reshape (key{layer}, heads)
            nk{layer} = Transpose <perm = [0, 2, 1, 3]> (key4d{layer})
            value4d{layer} = Reshape (value{layer}, heads)
            nv{layer} = Transpose <perm = [0, 2, 1, 3]> (value4d{layer})"""
    return parsed(
        f"""<ir_version: 10, opset_import: ["" : 24]>
        canonical ({text(inputs)}) => ({text(outputs)})
        <int64[4] heads = {{0, 0, {KV_HEADS}, {HEAD}}}, int64[2] flat = {{-1, {HIDDEN}}}>
        {{
            {split.replace("SPLIT", ", num_outputs = 4")}
            e = Gather (embedding, input_ids)
            p = Gather (positions, position_ids)
            x0 = Add (e, p)
            {layers}
            rows = Reshape (x{LAYERS}, flat)
            last = Gather (rows, logits_index)
            logits = MatMul (last, head)
            {join}
        }}""",
        "float32",
    )


def lowered_graph(tiny: Tiny, batch: int, seq: int | str) -> onnx.ModelProto:
    """The ATC dialect by hand: opset 16, NPURmsNorm, attention as MatMul and Softmax."""
    inputs, outputs = interface(tiny, batch, seq, tiny.capacity, integer="int32", dtype=tiny.dtype)
    split, join = ends(tiny)
    layers = ""
    for layer, window in enumerate(tiny.windows):
        layers += f"""
            n{layer}, rstd{layer} = NPURmsNorm (x{layer}, gamma{layer})
            q{layer} = MatMul (n{layer}, wq{layer})
            q4d{layer} = Reshape (q{layer}, q_heads)
            qt{layer} = Transpose <perm = [0, 2, 1, 3]> (q4d{layer})
            qg{layer} = Reshape (qt{layer}, grouped)
            key{layer} = MatMul (n{layer}, wk{layer})
            key4d{layer} = Reshape (key{layer}, heads)
            nk{layer} = Transpose <perm = [0, 2, 1, 3]> (key4d{layer})
            value{layer} = MatMul (n{layer}, wv{layer})
            value4d{layer} = Reshape (value{layer}, heads)
            nv{layer} = Transpose <perm = [0, 2, 1, 3]> (value4d{layer})
            allk{layer} = Concat <axis = 2> (k{layer}, nk{layer})
            allv{layer} = Concat <axis = 2> (v{layer}, nv{layer})
            kt{layer} = Transpose <perm = [0, 1, 3, 2]> (allk{layer})
            raw{layer} = MatMul (qg{layer}, kt{layer})
            scaled{layer} = Mul (raw{layer}, half)
            by_head{layer} = Reshape (scaled{layer}, by_heads)
            masked{layer} = Add (by_head{layer}, {mask_name(window)})
            share{layer} = Softmax <axis = -1> (masked{layer})
            shareg{layer} = Reshape (share{layer}, by_groups)
            yg{layer} = MatMul (shareg{layer}, allv{layer})
            y4d{layer} = Reshape (yg{layer}, y_heads)
            yt{layer} = Transpose <perm = [0, 2, 1, 3]> (y4d{layer})
            y{layer} = Reshape (yt{layer}, y_rows)
            o{layer} = MatMul (y{layer}, wo{layer})
            x{layer + 1} = Add (x{layer}, o{layer})"""
    # With gears, -1 is the dim that follows from the others, and 0 the one that stays.
    groups = HEADS // KV_HEADS
    rows, grouped, total = (seq, groups * seq, tiny.capacity + seq) if seq != "seq" else (-1, -1, 0)
    return parsed(
        f"""<ir_version: 9, opset_import: ["" : 16]>
        lowered ({text(inputs)}) => ({text(outputs)})
        <int64[4] heads = {{{batch}, {rows}, {KV_HEADS}, {HEAD}}},
         int64[4] q_heads = {{{batch}, {rows}, {HEADS}, {HEAD}}},
         int64[4] grouped = {{{batch}, {KV_HEADS}, {grouped}, {HEAD}}},
         int64[4] by_heads = {{{batch}, {HEADS}, {rows}, {total}}},
         int64[4] by_groups = {{{batch}, {KV_HEADS}, {grouped}, {total}}},
         int64[4] y_heads = {{{batch}, {HEADS}, {rows}, {HEAD}}},
         int64[3] y_rows = {{{batch}, {rows}, {HEADS * HEAD}}},
         int64[2] flat = {{-1, {HIDDEN}}}>
        {{
            {split.replace("SPLIT", "")}
            e = Gather (embedding, input_ids)
            p = Gather (positions, position_ids)
            x0 = Add (e, p)
            {layers}
            rows = Reshape (x{LAYERS}, flat)
            last = Gather (rows, logits_index)
            logits = MatMul (last, head)
            {join}
        }}""",
        tiny.dtype,
    )


def exported_graph(windows: tuple[int | None, ...]) -> onnx.ModelProto:
    """See `exported_text`, with its weights."""
    return parsed(exported_text(windows), "float32")


def exported_text(windows: tuple[int | None, ...]) -> str:
    """An export: growing 4-D caches, an integer mask of the text so far, an input nobody uses."""
    past = [
        TensorSpec(f"past.{layer}.{kind}", "float32", ("b", KV_HEADS, "p", HEAD))
        for layer in range(LAYERS)
        for kind in ("key", "value")
    ]
    present = [
        TensorSpec(f"present.{layer}.{kind}", "float32", ("b", KV_HEADS, "t", HEAD))
        for layer in range(LAYERS)
        for kind in ("key", "value")
    ]
    inputs = (
        TensorSpec("ids", "int64", ("b", "s")),
        TensorSpec("mask", "int64", ("b", "t")),
        TensorSpec("pos", "int64", ("b", "s")),
        *past,
        TensorSpec("unused", "float32", ("b", 3)),
    )
    logits = TensorSpec("logits", "float32", ("b", "s", VOCABULARY))
    layers = ""
    for layer in range(LAYERS):
        layers += f"""
            near{layer} = Less (back, window{layer})
            causal{layer} = And (past_only, near{layer})
            seen{layer} = And (causal{layer}, real)
            bias{layer} = Where (seen{layer}, zero, low)
            n{layer} = RMSNormalization <axis = -1, epsilon = 1e-6> (x{layer}, gamma{layer})
            q{layer} = MatMul (n{layer}, wq{layer})
            k{layer} = MatMul (n{layer}, wk{layer})
            v{layer} = MatMul (n{layer}, wv{layer})
            y{layer}, "present.{layer}.key", "present.{layer}.value" =
                Attention <q_num_heads = {HEADS}, kv_num_heads = {KV_HEADS}, scale = 0.5>
                (q{layer}, k{layer}, v{layer}, bias{layer},
                 "past.{layer}.key", "past.{layer}.value")
            o{layer} = MatMul (y{layer}, wo{layer})
            x{layer + 1} = Add (x{layer}, o{layer})"""
    limits = "".join(
        f", int64 window{layer} = {{{window or 1000}}}" for layer, window in enumerate(windows)
    )
    return f"""<ir_version: 10, opset_import: ["" : 24]>
        exported ({text(inputs)}) => ({text((logits, *present))})
        <int64 nought = {{0}}, int64 one = {{1}}, int64[1] ahead = {{1}},
         int64[2] blocks = {{1, 2}}, float zero = {{0.0}}, float low = {{-30000.0}}{limits}>
        {{
            total = Shape <start = 1, end = 2> (mask)
            t = Squeeze (total)
            size = Shape <start = 1, end = 2> (ids)
            s = Squeeze (size)
            start = Sub (t, s)
            query = Range (start, t, one)
            key = Range (nought, t, one)
            column = Unsqueeze (query, ahead)
            back = Sub (column, key)
            past_only = GreaterOrEqual (back, nought)
            flag = Greater (mask, nought)
            real = Unsqueeze (flag, blocks)
            e = Gather (embedding, ids)
            p = Gather (positions, pos)
            x0 = Add (e, p)
            {layers}
            logits = MatMul (x{LAYERS}, head)
        }}"""


def parsed(source: str, dtype: str) -> onnx.ModelProto:
    """Parse the text, and add the weights that it uses."""
    model = parser.parse_model(source)
    used = {name for node in model.graph.node for name in node.input}
    for name, array in weights().items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, dtype), name))
    return model


def build(folder: Path, tiny: Tiny) -> Bundle:
    """Write the bundle and, beside it, the export."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder.parent / f"{folder.name}-export.onnx"
    source.write_bytes(exported_graph(tiny.windows).SerializeToString(deterministic=True))
    save(ir.from_proto(canonical_graph(tiny)), folder / "canonical.onnx")
    buckets = []
    lengths = (1, *tiny.prefill)
    with WeightWriter(folder / "weights.bin") as writer:
        for batch in tiny.batches:
            for seq in ("seq",) if tiny.gears else lengths:
                kind = "gears" if tiny.gears else "decode" if seq == 1 else "prefill"
                name = f"{kind}_b{batch}_s{seq}_c{tiny.capacity}"
                inputs, outputs = interface(
                    tiny, batch, seq, tiny.capacity, integer="int32", dtype=tiny.dtype
                )
                bucket = Bucket(
                    name=name,
                    kind=kind,
                    batch=batch,
                    seq=max(lengths) if tiny.gears else seq,
                    capacity=tiny.capacity,
                    file=f"{name}.onnx",
                    inputs=inputs,
                    outputs=outputs,
                    om=f"om/{name}.om" if tiny.om else None,
                    command=(),
                    gears=lengths if tiny.gears else (),
                )
                graph = ir.from_proto(lowered_graph(tiny, batch, seq))
                save(graph, folder / bucket.file, writer=writer, threshold=64)
                buckets.append(bucket)
    for bucket in buckets if tiny.om else []:
        compile_om(folder, bucket)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest_of(tiny, tuple(buckets), source, files).save(folder)
    return Bundle.open(folder)


def compile_om(folder: Path, bucket: Bucket) -> None:
    """What atc would do, with --external_weight=1."""
    shapes = {
        spec.name: tuple(dim if isinstance(dim, int) else -1 for dim in spec.shape)
        for spec in bucket.inputs
    }
    open_dims = [dim for spec in bucket.inputs for dim in spec.shape if isinstance(dim, str)]
    gears = [
        tuple(evaluate(parse_dim(dim), {"seq": seq}) for dim in open_dims) for seq in bucket.gears
    ]
    (folder / "om").mkdir(exist_ok=True)
    simulate_om(folder / bucket.file, folder / bucket.om, shapes=shapes, gears=gears)


def manifest_of(
    tiny: Tiny, buckets: tuple[Bucket, ...], source: Path, files: dict[str, Path]
) -> Manifest:
    pairs = [
        tuple((f"{word}.{layer}.key", f"{word}.{layer}.value") for layer in range(LAYERS))
        for word in ("past", "present")
    ]
    return Manifest(
        schema_version=SCHEMA_VERSION,
        omforge="0",
        target="none",
        dtype=tiny.dtype,
        batch=tiny.batches[0],
        context=tiny.capacity,
        model=ModelFacts(
            model_type="tiny",
            layers=LAYERS,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_size=HEAD,
            hidden_size=HIDDEN,
            vocab_size=VOCABULARY,
            eos_token_ids=(EOS,),
            bos_token_id=1,
            pad_token_id=0,
            max_positions=POSITIONS,
        ),
        kv=KvCache(
            layout=tiny.layout,
            layers=LAYERS,
            kv_heads=KV_HEADS,
            head_size=HEAD,
            value_head_size=HEAD,
            capacity=tiny.capacity,
            dtype=tiny.dtype,
        ),
        masks=tiny.masks,
        mask_value=-30000.0,
        buckets=buckets,
        canonical="canonical.onnx",
        weights="weights.bin",
        export=Export(
            path=f"../{source.name}",
            sha256=digest(source),
            input_ids="ids",
            attention_mask="mask",
            position_ids="pos",
            past=pairs[0],
            present=pairs[1],
            logits="logits",
            extra=(TensorSpec("unused", "float32", ("b", 3)),),
            dtype="float32",
        ),
        files={name: digest(path) for name, path in files.items()},
        coverage={},
    )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change_manifest(folder: Path, change) -> None:
    """Edit the JSON of a bundle's manifest in place: `change` gets the data."""
    file = folder / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(sealed(data)))
