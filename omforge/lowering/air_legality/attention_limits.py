"""What the tilings of fused attention refuse.

Letters: B batch, S tokens, N heads, D head size, H = N*D; T all tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from omforge.lowering.air_legality.limits import TRANSFORMER, limit
from omforge.lowering.air_legality.subject import Call
from omforge.lowering.target import Target

Shape = tuple[int, ...]

LAYOUTS: Mapping[str, tuple[str, str]] = {
    "BSH": ("BSH", "BSH"),
    "BSND": ("BSND", "BSND"),
    "BNSD": ("BNSD", "BNSD"),
    "BNSD_BSND": ("BNSD", "BSND"),
    "BSH_BNSD": ("BSH", "BNSD"),
    "BSND_BNSD": ("BSND", "BNSD"),
    "BSH_NBSD": ("BSH", "NBSD"),
    "BSND_NBSD": ("BSND", "NBSD"),
    "BNSD_NBSD": ("BNSD", "NBSD"),
    "NSD": ("NSD", "NSD"),
    "SH": ("SH", "SH"),
    "TND": ("TND", "TND"),
    "NTD": ("NTD", "NTD"),
    "NTD_TND": ("NTD", "TND"),
    "TND_NTD": ("TND", "NTD"),
}
"""Values of input_layout: the layout of the query, key and value, and of the output."""

_INCRE_LAYOUTS = ("BSH", "BNSD", "BSND")
_PROMPT_LAYOUTS = ("BSH", "BNSD", "BSND", "SH", "NSD", "BNSD_BSND")
_FLOATS = ("float16", "bfloat16", "float32")  # masks that kernels' tables list, and tilings refuse
_SPARSE_MASK = 2048


@dataclass(frozen=True)
class Sizes:
    """The sizes of a query, key or value; B and N are 1 where its layout has none."""

    batch: int
    heads: int
    tokens: int
    size: int


def sizes(shape: Shape, layout: str, heads: int) -> Sizes | None:
    """Read a shape; None where it does not fit the layout."""
    if len(shape) != len(layout):
        return None
    named = dict(zip(layout, shape, strict=True))
    if "H" in named:
        if heads < 1 or named["H"] % heads:
            return None
        named |= {"N": heads, "D": named["H"] // heads}
    return Sizes(named.get("B", 1), named["N"], named.get("S", named.get("T", 0)), named["D"])


@dataclass(frozen=True)
class _Attention:
    """One call taken apart; `groups` query heads share one of key and value."""

    call: Call
    layout: str
    query: Sizes
    key: Sizes
    heads: int
    kv_heads: int
    paged: bool

    @property
    def groups(self) -> int:
        return self.heads // self.kv_heads

    @property
    def kv_dtype(self) -> str | None:
        return self.call.tensor("key").dtype


def _heads(call: Call) -> tuple[int, int]:
    heads = call.integer("num_heads") or 0
    return heads, call.integer("num_key_value_heads") or heads


def _head_faults(heads: int, kv_heads: int) -> Iterator[str]:
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        yield f"{heads} heads over {kv_heads} of key and value"
    elif heads // kv_heads > 64:
        yield f"{heads // kv_heads} query heads share one of key and value, more than 64"


def _apart(call: Call, layout: str) -> _Attention | str | None:
    """Take a call apart: what does not fit in words, None where shapes are not known."""
    heads, kv_heads = _heads(call)
    query, key, value = (call.tensor(name).static for name in ("query", "key", "value"))
    if query is None or key is None or value is None:
        return None
    paged = call.has("block_table")
    of_query = sizes(query, layout, heads)
    if of_query is None:
        return f"query {list(query)} is not {layout} of {heads} heads"
    if key != value:
        return f"key {list(key)} and value {list(value)} differ"
    # Pages: [blocks, block size, H], or [blocks, N, block size, D] in newer releases.
    pages = "BSH" if len(key) == 3 else "BNSD"
    of_key = sizes(key, pages if paged else layout, kv_heads)
    if of_key is None:
        return f"key {list(key)} is not {layout} of {kv_heads} heads"
    if paged:
        table = call.tensor("block_table").static
        block = call.integer("block_size") or 0
        tokens = table[1] * block if table is not None and len(table) == 2 else of_key.tokens
        of_key = Sizes(of_query.batch, of_key.heads, tokens, of_key.size)
    if of_query.heads != heads or of_key.heads != kv_heads:
        return f"{of_query.heads} heads over {of_key.heads} are stated as {heads} over {kv_heads}"
    if of_query.size != of_key.size:
        return f"the head size is {of_query.size} in query and {of_key.size} in key"
    members = len(call.inputs["key"])
    batch = of_query.batch
    if not paged and (members if members > 1 else of_key.batch) != batch:
        return f"query has {batch} rows, key {members if members > 1 else of_key.batch}"
    return _Attention(call, layout, of_query, of_key, heads, kv_heads, paged)


def incre_attention(call: Call, target: Target) -> Iterator[str]:
    """IncreFlashAttention: one query token, heads and sizes as its tiling takes them."""
    layout = call.text("input_layout")
    if layout not in _INCRE_LAYOUTS:
        yield f"input_layout is {layout}, not one of {', '.join(_INCRE_LAYOUTS)}"
        return
    if call.integer("inner_precise") not in (0, 1):
        yield f"inner_precise is {call.integer('inner_precise')}, not 0 or 1"
    faults = list(_head_faults(*_heads(call)))
    yield from faults
    if faults:
        return
    apart = _apart(call, layout)
    if isinstance(apart, str):
        yield apart
    elif apart is not None:
        yield from _incre_sizes(apart, target.family.name)
        yield from _decode_mask(apart)
        yield from _antiquant(apart, "antiquant_scale", "antiquant_offset")
        yield from _pages(apart, "actual_seq_lengths")


def _incre_sizes(of: _Attention, family: str) -> Iterator[str]:
    batch, tokens, size = of.query.batch, of.key.tokens, of.query.size
    if of.query.tokens != 1:
        yield f"the query has {of.query.tokens} tokens, not one"
    if size > 512 or of.kv_heads > 256:
        yield f"{of.kv_heads} heads of {size}: at most 256 of 512"
    if family != "310p":
        if batch > 65536:
            yield f"{batch} rows, more than 65536"
        return
    if batch > 256 or tokens > 65536:
        yield f"310P takes at most 256 rows of 65536 tokens, not {batch} of {tokens}"
    multiple = 32 if of.kv_dtype == "int8" else 16
    if size % multiple:
        yield f"310P takes head sizes that are multiples of {multiple}, not {size}"
    if of.groups > 1 and (of.groups > 32 or size > 128):
        yield f"310P shares key and value among at most 32 heads of 128, not {of.groups} of {size}"
    wanted = ("BSH", "BSND") if of.paged else ("BNSD",)
    if of.groups > 1 and of.layout not in wanted:
        yield f"310P shares key and value in {' or '.join(wanted)} alone, not in {of.layout}"


def _decode_mask(of: _Attention) -> Iterator[str]:
    if not of.call.has("atten_mask"):
        return
    mask = of.call.tensor("atten_mask")
    if mask.dtype in _FLOATS:
        yield f"atten_mask is {mask.dtype}, not bool, int8 or uint8"
    shape = mask.static
    if shape and (shape[0] != of.query.batch or shape[-1] < of.key.tokens):
        yield (
            f"atten_mask {list(shape)} is not of {of.query.batch} rows and {of.key.tokens} tokens"
        )


def _antiquant(of: _Attention, scale: str, offset: str) -> Iterator[str]:
    """An int8 or int4 cache beside a float query needs its scales."""
    if of.kv_dtype not in ("int8", "int4") or of.call.tensor("query").dtype == of.kv_dtype:
        return
    if not of.call.has(scale):
        yield f"the cache is {of.kv_dtype}, and {scale} is missing"
        return
    shape = of.call.tensor(scale).static
    n, d = of.kv_heads, of.query.size
    fits = ((2,), (2, n, 1, d), (2, 1, n, d), (2, n, d), (2, n * d))
    if shape is not None and shape not in fits:
        yield f"{scale} {list(shape)} is none of {', '.join(str(list(each)) for each in fits)}"
    other = of.call.tensor(offset).static if of.call.has(offset) else None
    if shape is not None and other is not None and len(other) != len(shape):
        yield f"{scale} {list(shape)} and {offset} {list(other)} have different ranks"


def _pages(of: _Attention, lengths: str) -> Iterator[str]:
    block = of.call.integer("block_size") or 0
    if not of.paged:
        return
    multiple = 32 if of.kv_dtype == "int8" else 16
    if not 0 < block <= 512 or block % multiple:
        yield f"block_size is {block}: a multiple of {multiple} up to 512 is taken"
    if not of.call.has(lengths):
        yield f"pages need {lengths}"


def prompt_attention(call: Call, target: Target) -> Iterator[str]:
    """PromptFlashAttention: heads, sizes and mask as its tiling takes them."""
    layout = call.text("input_layout")
    if layout not in _PROMPT_LAYOUTS:
        yield f"input_layout is {layout}, not one of {', '.join(_PROMPT_LAYOUTS)}"
        return
    faults = [*_head_faults(*_heads(call)), *_sparse_faults(call)]
    yield from faults
    if faults:
        return
    apart = _apart(call, LAYOUTS[layout][0])
    if isinstance(apart, str):
        yield apart
    elif apart is not None:
        yield from _prompt_sizes(apart)
        yield from _prompt_mask(apart)
        if target.family.name == "310p":
            yield from _prompt_310p(apart)


def _sparse_faults(call: Call) -> Iterator[str]:
    sparse = call.integer("sparse_mode") or 0
    if sparse not in range(5):
        yield f"sparse_mode is {sparse}, not 0 to 4"
    elif sparse >= 2 and not call.has("atten_mask"):
        yield f"sparse_mode {sparse} needs an atten_mask"
    before, after = call.integer("pre_tokens") or 0, call.integer("next_tokens") or 0
    if sparse in (0, 4) and -after > before:
        yield f"next_tokens {after} lies before pre_tokens {before}"


def _prompt_sizes(of: _Attention) -> Iterator[str]:
    if of.query.size > 512 or of.heads > 256:
        yield f"{of.heads} heads of {of.query.size}: at most 256 of 512"
    if max(of.query.tokens, of.key.tokens) > 20971520:
        yield f"{max(of.query.tokens, of.key.tokens)} tokens, more than 20971520"


def _prompt_mask(of: _Attention) -> Iterator[str]:
    if not of.call.has("atten_mask"):
        return
    mask = of.call.tensor("atten_mask")
    sparse = of.call.integer("sparse_mode") or 0
    added = of.call.op.type == "PromptFlashAttention" and sparse in (0, 1)
    if mask.dtype in _FLOATS and not (added and mask.dtype == "float16"):
        yield f"atten_mask is {mask.dtype}, not bool, int8 or uint8"
    shape = mask.static
    if shape is None:
        return
    rank = len(shape)
    if rank not in (2, 3, 4):
        yield f"atten_mask {list(shape)} has {rank} dims, not 2 to 4"
    elif sparse in (0, 1):
        rows = shape[0] if rank > 2 else 1
        wide = shape[-2] >= of.query.tokens and shape[-1] >= of.key.tokens
        if not wide or rows not in (1, of.query.batch):
            wanted = f"{of.query.tokens} x {of.key.tokens}"
            yield f"atten_mask {list(shape)} does not cover {of.query.batch} rows of {wanted}"
    elif shape[-2:] != (_SPARSE_MASK, _SPARSE_MASK) or set(shape[:-2]) - {1}:
        yield f"atten_mask {list(shape)} is not 2048 x 2048, as sparse_mode {sparse} has it"


def _prompt_310p(of: _Attention) -> Iterator[str]:
    call = of.call
    tokens, others = of.query.tokens, of.key.tokens
    if call.has("pse_shift"):
        yield "310P takes no pse_shift"
    limit_of_rows = 300 if of.layout == "BSH" else 128
    if of.query.batch > limit_of_rows or max(tokens, others) > 65536:
        yield (
            f"310P takes at most {limit_of_rows} rows of 65536 tokens, not "
            f"{of.query.batch} of {max(tokens, others)}"
        )
    if call.has("atten_mask") and (tokens != others or tokens % 16):
        yield f"310P takes a mask of S x S, S a multiple of 16, not {tokens} x {others}"
    before, after = call.integer("pre_tokens") or 0, call.integer("next_tokens") or 0
    if before < tokens or (after != 0 and after < others):
        yield (
            f"310P takes pre_tokens of S or more and next_tokens of 0, or S or more: not "
            f"{before} and {after}"
        )
    if call.integer("sparse_mode") or of.groups > 1:
        yield "310P takes sparse_mode 0 alone, and as many heads of key and value as of query"


def infer_attention(call: Call, target: Target) -> Iterator[str]:
    """FusedInferAttentionScore: heads, sizes, mask, scales and pages as its tiling takes them."""
    layout = call.text("input_layout")
    if layout not in LAYOUTS or layout == "SH":
        yield f"input_layout is {layout}, not one of {', '.join(sorted({*LAYOUTS} - {'SH'}))}"
        return
    faults = [*_head_faults(*_heads(call)), *_sparse_faults(call)]
    yield from faults
    if faults:
        return
    if "T" in LAYOUTS[layout][0]:
        for name in ("actual_seq_lengths", "actual_seq_lengths_kv"):
            if not call.has(name):
                yield f"{layout} needs {name}"
        return
    apart = _apart(call, LAYOUTS[layout][0])
    if isinstance(apart, str):
        yield apart
        return
    if apart is None:
        return
    yield from _prompt_sizes(apart)
    size, int8 = apart.query.size, "int8" in (apart.kv_dtype, call.result("attention_out").dtype)
    if size % (32 if int8 else 16):
        yield f"the head size {size} is no multiple of {32 if int8 else 16}"
    yield from _pages(apart, "actual_seq_lengths_kv")
    if apart.query.tokens == 1:  # which it hands to the tiling of IncreFlashAttention
        yield from () if call.integer("sparse_mode") else _decode_mask(apart)
    else:
        yield from _prompt_mask(apart)
        if call.integer("antiquant_mode"):
            yield f"antiquant_mode {call.integer('antiquant_mode')} with a query of many tokens"
    if call.has("key_antiquant_scale") != call.has("value_antiquant_scale"):
        yield "key_antiquant_scale and value_antiquant_scale come together"
    if not call.has("key_antiquant_scale") and not call.integer("antiquant_mode"):
        yield from _antiquant(apart, "antiquant_scale", "antiquant_offset")


_ATTENTION = f"{TRANSFORMER}:attention"

RULES = (
    limit(
        "air-incre-attention",
        ("IncreFlashAttention",),
        f"{_ATTENTION}/incre_flash_attention/op_host/incre_flash_attention_tiling_check.cpp",
        incre_attention,
    ),
    limit(
        "air-prompt-attention",
        ("PromptFlashAttention",),
        f"{_ATTENTION}/prompt_flash_attention/op_host/prompt_flash_attention_tiling.cpp",
        prompt_attention,
    ),
    limit(
        "air-infer-attention",
        ("FusedInferAttentionScore",),
        f"{_ATTENTION}/fused_infer_attention_score/op_host/fused_infer_attention_score_tiling.cpp",
        infer_attention,
    ),
)
