"""ONNX text of a one-layer language model, in many spellings of the same attention.

What varies is in the fields of `Block`; everything else is as small as it can be. The text is what
exporters write once constants are initializers; `fused` runs the passes that come before too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from omforge import ir
from omforge.ir import numerics
from omforge.passes import make_pipeline
from omforge.rewriting.base import Pass
from omforge.testing import parse

VOCABULARY, HIDDEN = 16, 8
WINDOW, CHUNK = 3, 4
LOW = -3.0e38
LONGEST = 32
"""Positions that the tables of a `Block` hold."""


@dataclass
class Writer:
    """Lines of a graph, and the initializers that they use."""

    lines: list[str] = field(default_factory=list[str])
    constants: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, text: str) -> None:
        """Append nodes, one a line."""
        self.lines += [line.strip() for line in text.splitlines() if line.strip()]

    def ints(self, *numbers: int) -> str:
        """The name of an int64 vector."""
        name = "i_" + "_".join(map(str, numbers)).replace("-", "m")
        values = ", ".join(map(str, numbers))
        self.constants[name] = f"int64[{len(numbers)}] {name} = {{{values}}}"
        return name

    def int(self, number: int) -> str:
        """The name of an int64 scalar."""
        name = f"n_{number}"
        self.constants[name] = f"int64 {name} = {{{number}}}"
        return name

    def number(self, name: str, value: float) -> str:
        """The name of a float scalar; the text has no infinity, so that is computed."""
        if np.isinf(value):
            self.constants[f"{name}_one"] = f"float {name}_one = {{{np.sign(value)}}}"
            self.constants["nought"] = "float nought = {0.0}"
            self.add(f"{name} = Div ({name}_one, nought)")
        else:
            self.constants[name] = f"float {name} = {{{value!r}}}"
        return name

    def tensor(self, name: str, array: np.ndarray) -> str:
        """The name of a float or boolean tensor."""
        shape = ", ".join(map(str, array.shape))
        kind = "bool" if array.dtype == np.bool_ else "float"
        values = ", ".join(str(int(x)) if kind == "bool" else f"{x:.9g}" for x in array.ravel())
        self.constants[name] = f"{kind}[{shape}] {name} = {{{values}}}"
        return name

    def weights(self, name: str, *shape: int, scale: float = 0.7) -> str:
        """The name of a float tensor, its numbers drawn by its name."""
        random = np.random.default_rng(list(name.encode()))
        return self.tensor(name, scale * random.standard_normal(shape))


@dataclass(frozen=True)
class Block:
    """One attention block, and how it is written.

    Attributes:
        heads: N.
        kv_heads: K.
        size: D of queries and keys.
        value_size: D of values; that of keys where it is 0.
        cache: With past and present.
        positions: With position_ids as an input.
        visible: What a query sees: "causal", "trilu" (made as a triangle), "table" (cut out of
            one), "window", "chunk", "all", "near" (a window on both sides), "alibi", or "" where nothing is masked.
        padding: Whether padding is hidden.
        applied: How the mask is: "added", "where", "inverted", "two" (one after the other), "sum"
            (both added up before) or "product" (1 - mask, times the lowest).
        low: What hidden scores get.
        scale: Where scores are scaled: "mul", "div", "query", "both" or "".
        repeat: How key heads are repeated: "expand", "concat", "gather" or "tile" (another order).
        keys: How keys are transposed: "perm", "twice", or "flat" (as [B*N, T, D]).
        split: How heads are split: "reshape" or "fused" (slices of one QKV product).
        operator: How an exporter of opset 23 writes `Attention` itself: "4-D", "3-D", "inside" (with
            the cache), or "" where it is written out. Then `applied` is "added" or "boolean".
        causal: Whether the operator hides later keys itself.
        softcap: 0 for none.
        guard: What empty rows get: "", "nan" or "rows".
        rotary: How it is rotated: "half", "split", "interleaved", "stacked", or "" for not.
        width: What of each head is rotated; all where it is 0.
        tables: How cos and sin are made: "computed", "gathered" (from tables of numbers).
        batch: B, a name or a number; so `seq` and `past`.
        edits: Replacements in the text: what makes a near miss of it.
        outputs: What else is an output, with its type.
    """

    heads: int = 4
    kv_heads: int = 2
    size: int = 4
    value_size: int = 0
    cache: bool = True
    positions: bool = True
    visible: str = "causal"
    padding: bool = True
    applied: str = "added"
    low: float = LOW
    scale: str = "mul"
    repeat: str = "expand"
    keys: str = "perm"
    split: str = "reshape"
    operator: str = ""
    causal: bool = False
    softcap: float = 0.0
    guard: str = ""
    rotary: str = ""
    width: int = 0
    tables: str = "computed"
    batch: str = "batch"
    seq: str = "seq"
    past: str = "past"
    edits: tuple[tuple[str, str], ...] = ()
    outputs: tuple[str, ...] = ()

    def text(self) -> str:
        """The model."""
        w = Writer()
        w.weights("table", VOCABULARY, HIDDEN, scale=1.0)
        w.add("x = Gather (table, input_ids)")
        self._shapes(w)
        self._heads(w)
        names = {"q": "q4", "k": "k4", "v": "v4"}
        if self.rotary:
            self._tables(w)
            for name in ("q", "k"):
                self._rotate(w, names[name])
                names[name] += "_r"
        if self.cache and self.operator != "inside":
            for name, role in (("k", "key"), ("v", "value")):
                w.add(f"present_{role} = Concat <axis = 2> (past_{role}, {names[name]})")
                names[name] = f"present_{role}"
        keys = self._repeated(w, names["k"], self.size)
        if self.operator:
            values = self._repeated(w, names["v"], self._value_size)
            self._operator(w, names["q"], keys, values)
        else:
            self._scores(w, names["q"], keys)
            self._values(w, self._repeated(w, names["v"], self._value_size))
        w.weights("head", HIDDEN, VOCABULARY)
        w.add("logits = MatMul (hidden, head)")
        text = self._header(w) + "{\n    " + "\n    ".join(w.lines) + "\n}"
        for old, new in self.edits:
            assert old in text, f"{old!r} is not in\n{text}"
            text = text.replace(old, new)
        return text

    @property
    def _value_size(self) -> int:
        return self.value_size or self.size

    def _header(self, w: Writer) -> str:
        total = "total"
        if self.seq.isdigit() and (self.past.isdigit() or not self.cache):
            total = str(int(self.seq) + (int(self.past) if self.cache else 0))
        inputs = [f"int64[{self.batch}, {self.seq}] input_ids"]
        if self.padding:
            inputs.append(f"int64[{self.batch}, {total}] attention_mask")
        if self.positions:
            inputs.append(f"int64[{self.batch}, {self.seq}] position_ids")
        outputs = [f"float[{self.batch}, {self.seq}, {VOCABULARY}] logits"]
        if self.cache:
            for role, size in (("key", self.size), ("value", self._value_size)):
                shape = f"{self.batch}, {self.kv_heads}, {{}}, {size}"
                inputs.append(f"float[{shape.format(self.past)}] past_{role}")
                outputs.append(f"float[{shape.format(total)}] present_{role}")
        return (
            '<ir_version: 11, opset_import: ["" : 24]>\n'
            f"model ({', '.join(inputs)})\n  => ({', '.join([*outputs, *self.outputs])})\n"
            f"<{', '.join(w.constants.values())}>\n"
        )

    def _shapes(self, w: Writer) -> None:
        past = "Shape <start = 2, end = 3> (past_key)" if self.cache else f"Identity ({w.ints(0)})"
        w.add(f"""
            batch1 = Shape <end = 1> (input_ids)
            seq1 = Shape <start = 1, end = 2> (input_ids)
            past1 = {past}
            total1 = Add (past1, seq1)
            past0 = Squeeze (past1)
            total0 = Squeeze (total1)""")

    def _heads(self, w: Writer) -> None:
        """q4 [B, N, S, D], k4 and v4 [B, K, S, D]."""
        parts = (
            ("q", self.heads, self.size),
            ("k", self.kv_heads, self.size),
            ("v", self.kv_heads, self._value_size),
        )
        if self.split == "fused":
            w.weights("wqkv", HIDDEN, sum(count * size for _, count, size in parts))
            w.add("qkv = MatMul (x, wqkv)")
        start = 0
        for name, count, size in parts:
            end = start + count * size
            if self.split == "fused":
                w.add(f"{name} = Slice (qkv, {w.ints(start)}, {w.ints(end)}, {w.ints(2)})")
            else:
                w.add(f"{name} = MatMul (x, {w.weights(f'w{name}', HIDDEN, count * size)})")
            w.add(f"{name}s = Reshape ({name}, {w.ints(0, 0, count, size)})")
            w.add(f"{name}4 = Transpose <perm = [0, 2, 1, 3]> ({name}s)")
            start = end

    def _repeated(self, w: Writer, name: str, size: int) -> str:
        """[B, K, T, D] as [B, N, T, D]."""
        times = self.heads // self.kv_heads
        out = f"{name}_n"
        if times == 1 or self.repeat == "none":
            return name
        if self.repeat == "gather":
            order = [head // times for head in range(self.heads)]
            w.add(f"{out} = Gather <axis = 1> ({name}, {w.ints(*order)})")
        elif self.repeat == "tile":
            w.add(f"{out} = Tile ({name}, {w.ints(1, times, 1, 1)})")
        else:
            many = (
                f"Expand ({name}_u, {w.ints(1, 1, times, 1, 1)})"
                if self.repeat == "expand"
                else f"Concat <axis = 2> ({', '.join([f'{name}_u'] * times)})"
            )
            w.add(f"""
                {name}_u = Unsqueeze ({name}, {w.ints(2)})
                {name}_e = {many}
                {name}_h = Concat <axis = 0> ({w.ints(0, self.heads)}, total1, {w.ints(size)})
                {out} = Reshape ({name}_e, {name}_h)""")
        return out

    # --- rotary ---------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        return self.width or self.size

    def _tables(self, w: Writer) -> None:
        """Tables cos and sin [B, 1, S, width]."""
        half = self._width // 2
        inv_freq = (100.0 ** (-np.arange(half) / half)).astype(np.float32)
        if self.tables == "gathered":
            angles = np.arange(LONGEST)[:, None] * inv_freq
            for name, function in (("cos", np.cos), ("sin", np.sin)):
                w.tensor(f"{name}_table", function(angles))
                w.add(f"{name}_a = Gather ({name}_table, position_ids)")
        else:
            w.tensor("inv_freq", inv_freq)
            w.add(f"""
                position = Cast <to = 1> (position_ids)
                position_u = Unsqueeze (position, {w.ints(2)})
                angle = Mul (position_u, inv_freq)
                cos_a = Cos (angle)
                sin_a = Sin (angle)""")
        for name in ("cos", "sin"):
            if self.rotary in ("half", "split"):
                w.add(f"{name}_b = Concat <axis = -1> ({name}_a, {name}_a)")
            else:  # each number twice, side by side
                w.add(f"""
                    {name}_c = Unsqueeze ({name}_a, {w.ints(3)})
                    {name}_d = Concat <axis = 3> ({name}_c, {name}_c)
                    {name}_b = Reshape ({name}_d, {w.ints(0, 0, self._width)})""")
            w.add(f"{name} = Unsqueeze ({name}_b, {w.ints(1)})")

    def _rotate(self, w: Writer, name: str) -> None:
        """`name`_r, rotated by cos and sin."""
        half, width, x = self._width // 2, self._width, name
        if width < self.size:
            w.add(f"{name}_p = Slice ({name}, {w.ints(0)}, {w.ints(width)}, {w.ints(3)})")
            w.add(f"{name}_o = Slice ({name}, {w.ints(width)}, {w.ints(9999)}, {w.ints(3)})")
            x = f"{name}_p"
        axis = w.ints(3)
        if self.rotary == "half":
            w.add(f"""
                {x}_1 = Slice ({x}, {w.ints(0)}, {w.ints(half)}, {axis})
                {x}_2 = Slice ({x}, {w.ints(half)}, {w.ints(9999)}, {axis})
                {x}_n = Neg ({x}_2)
                {x}_t = Concat <axis = -1> ({x}_n, {x}_1)""")
        elif self.rotary == "split":
            w.add(f"""
                {x}_1, {x}_2 = Split <axis = -1, num_outputs = 2> ({x})
                {x}_n = Mul ({x}_2, {w.number("minus", -1.0)})
                {x}_t = Concat <axis = 3> ({x}_n, {x}_1)""")
        else:
            step = w.ints(2)
            w.add(f"""
                {x}_1 = Slice ({x}, {w.ints(0)}, {w.ints(9999)}, {axis}, {step})
                {x}_2 = Slice ({x}, {w.ints(1)}, {w.ints(9999)}, {axis}, {step})
                {x}_n = Neg ({x}_2)
                {x}_u = Unsqueeze ({x}_n, {w.ints(4)})
                {x}_v = Unsqueeze ({x}_1, {w.ints(4)})
                {x}_c = Concat <axis = 4> ({x}_u, {x}_v)
                {x}_t = Reshape ({x}_c, {w.ints(0, 0, 0, -1)})""")
        w.add(f"""
            {x}_cos = Mul ({x}, cos)
            {x}_sin = Mul ({x}_t, sin)""")
        if width < self.size:
            w.add(f"{x}_y = Add ({x}_cos, {x}_sin)")
            w.add(f"{name}_r = Concat <axis = -1> ({x}_y, {name}_o)")
        else:
            w.add(f"{name}_r = Add ({x}_cos, {x}_sin)")

    # --- masks ----------------------------------------------------------------------------------

    def _mask(self, w: Writer, scores: str) -> None:
        """Masked: scores where something is seen."""
        if not self.visible:
            w.add(f"masked = Identity ({scores})")
            return
        low, zero = w.number("low", self.low), w.number("zero", 0.0)
        if self.visible == "alibi":
            slopes = -(2.0 ** -np.arange(self.heads))[None, :, None, None]
            w.add(
                f"""
                ages = Range (zero0, total0, {w.int(1)})
                ages_f = Cast <to = 1> (ages)
                bias = Mul (ages_f, {w.tensor("slopes", slopes)})
                masked = Add ({scores}, bias)""".replace("zero0", w.int(0))
            )
            return
        self._order(w)
        if self.padding:
            w.add(
                f"real = Cast <to = 9> (attention_mask)\nshown = Unsqueeze (real, {w.ints(1, 2)})"
            )
        if self.padding and self.applied not in ("two", "sum", "product"):
            w.add("seen = And (order, shown)")
        elif self.applied not in ("two", "sum", "product"):
            w.add("seen = Identity (order)")
        match self.applied:
            case "added":
                w.add(f"bias = Where (seen, {zero}, {low})\nmasked = Add ({scores}, bias)")
            case "where":
                w.add(f"masked = Where (seen, {scores}, {low})")
            case "inverted":
                w.add(f"hidden_keys = Not (seen)\nmasked = Where (hidden_keys, {low}, {scores})")
            case "two":
                w.add(f"""
                    masked_a = Where (order, {scores}, {low})
                    bias = Where (shown, {zero}, {low})
                    masked = Add (masked_a, bias)""")
            case "sum":
                w.add(f"""
                    bias_a = Where (order, {zero}, {low})
                    bias_b = Where (shown, {zero}, {low})
                    bias = Add (bias_a, bias_b)
                    masked = Add (bias, {scores})""")
            case _:
                w.add(f"""
                    ones = Cast <to = 1> (shown)
                    away = Sub ({w.number("one", 1.0)}, ones)
                    bias_b = Mul (away, {low})
                    bias_a = Where (order, {zero}, {low})
                    bias = Add (bias_a, bias_b)
                    masked = Add ({scores}, bias)""")

    def _order(self, w: Writer) -> None:
        """What a query sees by its place alone: boolean [S, T], or with leading unit axes."""
        if self.visible == "table":
            square = np.tril(np.ones((1, 1, LONGEST, LONGEST), dtype=np.bool_))
            w.tensor("square", square)
            w.add(f"order_a = Slice (square, past1, total1, {w.ints(2)})")
            w.add(f"order = Slice (order_a, {w.ints(0)}, total1, {w.ints(3)})")
            return
        if self.visible == "trilu":
            w.add(f"""
                shape2 = Concat <axis = 0> (seq1, total1)
                lows = Expand ({w.number("one", 1.0)}, shape2)
                after = Add (past0, {w.int(1)})
                upper = Trilu <upper = 1> (lows, after)
                order = Equal (upper, {w.number("zero", 0.0)})""")
            return
        w.add(f"""
            query_a = Range (past0, total0, {w.int(1)})
            query = Unsqueeze (query_a, {w.ints(1)})
            key = Range ({w.int(0)}, total0, {w.int(1)})
            causal = LessOrEqual (key, query)""")
        match self.visible:
            case "causal":
                w.add("order = Identity (causal)")
            case "all":
                w.add("order = GreaterOrEqual (query, query)")
            case "near":
                w.add(f"""
                    far = Sub (query, key)
                    away = Abs (far)
                    order = Less (away, {w.int(WINDOW)})""")
            case "window":
                w.add(f"""
                    far = Sub (query, key)
                    near = Less (far, {w.int(WINDOW)})
                    order = And (causal, near)""")
            case _:
                w.add(f"""
                    query_c = Div (query, {w.int(CHUNK)})
                    key_c = Div (key, {w.int(CHUNK)})
                    same = Equal (query_c, key_c)
                    order = And (causal, same)""")

    # --- scores and values ----------------------------------------------------------------------

    def _scores(self, w: Writer, q: str, k: str) -> None:
        """From queries and keys to probs."""
        match self.keys:
            case "perm":
                w.add(f"kt = Transpose <perm = [0, 1, 3, 2]> ({k})")
            case "twice":
                w.add(f"kt_a = Transpose <perm = [0, 2, 1, 3]> ({k})")
                w.add("kt = Transpose <perm = [0, 2, 3, 1]> (kt_a)")
            case _:
                w.add(f"""
                    kt_s = Concat <axis = 0> ({w.ints(-1)}, total1, {w.ints(self.size)})
                    kt_a = Reshape ({k}, kt_s)
                    kt_b = Transpose <perm = [0, 2, 1]> (kt_a)
                    kt_t = Concat <axis = 0> (batch1, {w.ints(self.heads, self.size)}, total1)
                    kt = Reshape (kt_b, kt_t)""")
        scale, last, transposed = 0.6, "scores", "kt"
        match self.scale:
            case "query":
                w.add(f"q_x = Mul ({q}, {w.number('scale', scale)})")
                q = "q_x"
            case "both":
                w.add(f"q_x = Mul ({q}, {w.number('scale', scale**0.5)})\nkt_x = Mul (scale, kt)")
                q, transposed = "q_x", "kt_x"
            case _:
                pass
        w.add(f"scores = MatMul ({q}, {transposed})")
        if self.scale == "mul":
            w.add(f"scaled = Mul (scores, {w.number('scale', scale)})")
            last = "scaled"
        elif self.scale == "div":
            w.add(f"scaled = Div (scores, {w.number('scale', 1 / scale)})")
            last = "scaled"
        if self.softcap:
            cap = w.number("cap", self.softcap)
            w.add(f"""
                capped_a = Div ({last}, {cap})
                capped_b = Tanh (capped_a)
                capped = Mul (capped_b, {cap})""")
            last = "capped"
        self._mask(w, last)
        w.add("probs = Softmax <axis = -1> (masked)")
        if self.guard == "nan":
            w.add(f"isnan = IsNaN (probs)\nsafe = Where (isnan, {w.number('zero', 0.0)}, probs)")

    def _operator(self, w: Writer, q: str, k: str, v: str) -> None:
        """From queries, keys and values to hidden, by `Attention`."""
        mask = self._operator_mask(w) if self.visible else ""
        options, outputs = ["scale = 0.6", f"is_causal = {int(self.causal)}"], "mixed"
        if self.softcap:
            options.append(f"softcap = {self.softcap}")
        if self.operator == "3-D":
            options += [f"q_num_heads = {self.heads}", f"kv_num_heads = {self.kv_heads}"]
            for name, x, width in (("k3", k, self.size), ("v3", v, self._value_size)):
                shape = w.ints(0, 0, self.kv_heads * width)
                w.add(f"{name}_t = Transpose <perm = [0, 2, 1, 3]> ({x})")
                w.add(f"{name} = Reshape ({name}_t, {shape})")
            q, k, v, outputs = "q", "k3", "v3", "joined"
        given = f"{q}, {k}, {v}, {mask}"
        if self.operator == "inside":
            given, outputs = f"{given}, past_key, past_value", "mixed, present_key, present_value"
        w.add(f"{outputs} = Attention <{', '.join(options)}> ({given})")
        if self.operator == "3-D":
            self._projected(w)
        else:
            self._behind(w)

    def _operator_mask(self, w: Writer) -> str:
        self._order(w)
        seen = "order"
        if self.padding:
            w.add(f"""
                real = Cast <to = 9> (attention_mask)
                shown = Unsqueeze (real, {w.ints(1, 2)})""")
            seen = "And (order, shown)"
        w.add(f"seen = {seen if self.padding else f'Identity ({seen})'}")
        if self.applied == "boolean":
            return "seen"
        zero, low = w.number("zero", 0.0), w.number("low", self.low)
        w.add(f"bias = Where (seen, {zero}, {low})")
        return "bias"

    def _values(self, w: Writer, v: str) -> None:
        """From probs and values to hidden."""
        w.add(f"mixed = MatMul ({'safe' if self.guard == 'nan' else 'probs'}, {v})")
        self._behind(w)

    def _behind(self, w: Writer) -> None:
        """From mixed values to hidden."""
        last = "mixed"
        if self.guard == "rows":
            w.add(f"""
                seen_f = Cast <to = 1> (seen)
                most = ReduceMax (seen_f, {w.ints(-1)})
                empty = Equal (most, {w.number("zero", 0.0)})
                guarded = Where (empty, {w.number("zero", 0.0)}, mixed)""")
            last = "guarded"
        width = self.heads * self._value_size
        w.add(f"""
            back = Transpose <perm = [0, 2, 1, 3]> ({last})
            joined = Reshape (back, {w.ints(0, 0, width)})""")
        self._projected(w)

    def _projected(self, w: Writer) -> None:
        w.add(f"hidden = MatMul (joined, {w.weights('wo', self.heads * self._value_size, HIDDEN)})")


def named(block: Block) -> ir.Model:
    """The model of a block, its dimensions named."""
    model = parse(block.text())
    make_pipeline("name-dims,fold-constants").run(model)
    return model


def fused(step: Pass, block: Block, *, padding_rows: bool = True) -> ir.Model:
    """The model after a pass; it is valid, and its numbers are those of the text.

    Args:
        step: The pass.
        block: What to write.
        padding_rows: Compare the rows of padding too. Nobody reads them, and where masks are
            applied one after the other, what they average is the exporter's whim.
    """
    original, model = named(block), named(block)
    step.run(model)
    ir.check(model)
    assert_same_for_all_steps(original, model, block, padding_rows=padding_rows)
    return model


STEPS = (  # rows, new tokens, past, padding on the left of the last row
    (1, 1, 0, 0),
    (1, 7, 0, 0),
    (2, 5, 0, 2),
    (2, 1, 6, 3),
    (2, 4, 9, 10),
    (1, 3, 12, 1),
)


def steps(block: Block) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of several sizes, with an empty and a filled past, and with padding on both sides."""
    seen: set[tuple[int, ...]] = set()
    for number, sizes in enumerate(STEPS):
        batch, seq, past = (
            int(fixed) if fixed.isdigit() else size
            for fixed, size in zip((block.batch, block.seq, block.past), sizes, strict=False)
        )
        past = past if block.cache else 0
        if (batch, seq, past) in seen:
            continue
        seen.add((batch, seq, past))
        random = np.random.default_rng(number)
        mask = np.ones((batch, past + seq), dtype=np.int64)
        mask[-1, : min(sizes[3], past + seq)] = 0
        if seq > 4:
            mask[0, -1] = 0  # padding on the right
        counted = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, past:]
        feeds = {"input_ids": random.integers(0, VOCABULARY, (batch, seq))}
        if block.padding:
            feeds["attention_mask"] = mask
        if block.positions:
            feeds["position_ids"] = counted
        for role, size in (("key", block.size), ("value", block.value_size or block.size)):
            if block.cache:
                shape = (batch, block.kv_heads, past, size)
                feeds[f"past_{role}"] = random.standard_normal(shape).astype(np.float32)
        yield feeds


def assert_same_for_all_steps(
    before: ir.Model, after: ir.Model, block: Block, *, padding_rows: bool = True
) -> None:
    """Assert that two models of a block return the same, wherever the first has numbers.

    Minus infinity in every score of a row gives NaN; `Attention` gives zeros there.
    """
    allowed = numerics.Tolerance(rtol=1e-4, atol=1e-5)
    for feeds in steps(block):
        expected, actual = numerics.run(before, feeds), numerics.run(after, feeds)
        assert list(actual) == list(expected)
        for name, reference in expected.items():
            got = actual[name]
            assert got.shape == reference.shape
            real = ~np.isnan(reference)
            if name == "logits" and not padding_rows:
                seq = reference.shape[1]
                real &= (feeds["attention_mask"][:, -seq:] != 0)[:, :, None]
            assert real.any()
            difference = numerics.max_abs_diff(got[real], reference[real])
            assert numerics.within(got[real], reference[real], allowed), (
                f"{name} differs by {difference:g} for {feeds['input_ids'].shape}"
            )


def ops(model: ir.Model) -> list[str]:
    """The ops of a model, in order."""
    return [node.op_type for node in model.graph]
