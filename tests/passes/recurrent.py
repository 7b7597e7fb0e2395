"""A language model of three layers: a causal short convolution, gated linear attention, attention.

The first two carry states of fixed size beside the cache of the third; all are written for chunks
of any length.
"""

from __future__ import annotations

from tests.passes.blocks import HIDDEN, Block, Writer

KERNEL, SIZE = 4, 4
WIDE = 128  # weights that are large enough for a bundle's weight file
CONV, LINEAR = f"float[batch, {HIDDEN}, {KERNEL - 1}]", f"float[batch, {SIZE}, {SIZE}]"

MASKED = "xp = Mul (x0, kept)"
"""What keeps padding out of the convolution, as exporters write it."""


def model(
    *, reads_mask: bool = False, swapped: bool = False, conv: str = CONV, linear: str = LINEAR
) -> str:
    """The text.

    Args:
        reads_mask: The convolution hides padding by the attention mask.
        swapped: The states' outputs come in another order than their inputs.
        conv: Type of the convolution's state.
        linear: Type of that of linear attention.
    """
    w = Writer()
    w.weights("kernel", HIDDEN, 1, KERNEL, scale=0.3)
    for name in ("q", "k", "v", "g", "f"):
        w.weights(f"l_w{name}", HIDDEN, SIZE, scale=0.2)
    w.weights("l_wo", SIZE, HIDDEN, scale=0.3)
    w.weights("m_w1", HIDDEN, WIDE, scale=0.1)
    w.weights("m_w2", WIDE, HIDDEN, scale=0.1)
    w.add("x0 = Gather (table, input_ids)")
    if reads_mask:
        # The last S of the mask [B, P+S], one for each new token.
        w.add(f"""
            from1 = Neg (seq1)
            recent = Slice (attention_mask, from1, {w.ints(9999)}, {w.ints(1)})
            kept_a = Cast <to = 1> (recent)
            kept = Unsqueeze (kept_a, {w.ints(2)})
            {MASKED}""")
    else:
        w.add("xp = Identity (x0)")
    w.add(f"""
        c_x = Transpose <perm = [0, 2, 1]> (xp)
        c_all = Concat <axis = 2> (conv_state, c_x)
        new_conv = Slice (c_all, {w.ints(1 - KERNEL)}, {w.ints(2**62)}, {w.ints(2)})
        c_y = Conv <group = {HIDDEN}, kernel_shape = [{KERNEL}]> (c_all, kernel)
        c_o = Transpose <perm = [0, 2, 1]> (c_y)
        x1 = Add (x0, c_o)
        l_q = MatMul (x1, l_wq)
        l_k0 = MatMul (x1, l_wk)
        l_v = MatMul (x1, l_wv)
        l_f0 = MatMul (x1, l_wf)
        l_f = Sigmoid (l_f0)
        l_k = Mul (l_k0, l_f)
        l_kt = Transpose <perm = [0, 2, 1]> (l_k)
        l_s0 = MatMul (l_q, l_kt)
        l_s = Trilu <upper = 0> (l_s0)
        l_new = MatMul (l_s, l_v)
        l_old = MatMul (l_q, ssm_state)
        l_y0 = Add (l_old, l_new)
        l_g0 = MatMul (x1, l_wg)
        l_g = Sigmoid (l_g0)
        l_y = Mul (l_y0, l_g)
        l_o = MatMul (l_y, l_wo)
        x2 = Add (x1, l_o)
        m_a = MatMul (x2, m_w1)
        m_b = Relu (m_a)
        m_c = MatMul (m_b, m_w2)
        x = Add (x2, m_c)
        l_kv = MatMul (l_kt, l_v)
        new_ssm = Add (ssm_state, l_kv)""")
    outputs = (f"{conv} new_conv", f"{linear} new_ssm")
    block = Block(rotary="half", outputs=outputs[::-1] if swapped else outputs)
    text = block.text()
    first = "x = Gather (table, input_ids)"
    shapes = text[text.index(first) + len(first) : text.index("q = MatMul")]
    for old, new in (
        # The sizes come first: what hides padding is cut by them.
        (first + shapes, shapes.strip() + "\n    " + "\n    ".join(w.lines) + "\n    "),
        ("<float[16, 8] table", f"<{', '.join(w.constants.values())}, float[16, 8] table"),
        ("] past_key,", f"] past_key, {conv} conv_state, {linear} ssm_state,"),
    ):
        assert text.count(old) == 1, f"{old!r} in\n{text}"
        text = text.replace(old, new)
    # Both write the same integers as constants.
    shared = [c for c in w.constants.values() if text.count(c) == 2]
    for constant in shared:
        text = text.replace(f"{constant}, ", "", 1)
    return text
