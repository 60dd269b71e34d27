"""The parametrised Triton kernels: a conv that gathers its input channels while it loads them.

Importing this module needs triton. Three kernels cover the layouts that are worth a kernel:

- `conv_nhwc`: implicit GEMM over channels-last memory, any kernel, stride, padding and dilation. The gather is a table
  of groups of `G` channels; a group is one or more 16-byte loads.
- `depthwise_nhwc`: its depthwise sibling.
- `point_nchw`: 1x1, stride 1, over NCHW memory, where any list of channels is as good as a range.

What makes the main loop as short as that of a conv without a gather (read off the compiled kernels):

- The table is read one block of K ahead, into a register that the loop carries. Read where it is used, it would cost
  the loads of `x` half of their pipeline stages.
- Alignment is provable, never promised: `group * G + k % G` is a multiple of `G` where `k` is, and all strides are
  passed in units of `V` elements (16 bytes) and multiplied here. No `multiple_of` hint is needed; none can be wrong.
- Rows beyond the end are clamped to row 0 and the table is filled up with a selected group whose weights are zero, so a
  1x1 has no load mask at all.
- All sizes are run-time integers that Triton must not specialise on: one binary per set of flags and tile.

Sums run in a fixed order without atomics: two runs are bitwise equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's language: arguments are what the launch makes them, and its functions exist only once compiled.
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false

# Arguments that Triton must not specialise on: 1 and multiples of 16 would make binaries of their own.
CONV_SIZES = ["M", "IH", "IW", "OH", "OW", "XS", "YS", "RS", "OC", "NKB", "SH", "SW", "PH", "PW", "DH", "DW"]
DEPTHWISE_SIZES = ["M", "IH", "IW", "OH", "OW", "XS", "YS", "RS", "OC", "SH", "SW", "PH", "PW", "DH", "DW"]
POINT_SIZES = ["P", "XB", "YB", "RB", "OC", "NKB"]


@triton.jit
def activate(v, ACT: tl.constexpr):
    """An activation in float32, by the name that the op takes."""
    if ACT == "relu":
        v = tl.maximum(v, 0.0)
    elif ACT == "relu6":
        v = tl.minimum(tl.maximum(v, 0.0), 6.0)
    elif ACT == "silu":
        v = v / (1.0 + tl.exp(-v))
    elif ACT == "hardswish":
        v = v * tl.minimum(tl.maximum(v + 3.0, 0.0), 6.0) * (1.0 / 6.0)
    elif ACT == "sigmoid":
        v = 1.0 / (1.0 + tl.exp(-v))
    return v


@triton.jit(do_not_specialize=CONV_SIZES)
def conv_nhwc(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    r_ptr,
    y_ptr,
    groups_ptr,
    M,
    IH,
    IW,
    OH,
    OW,
    XS,
    YS,
    RS,
    OC,
    NKB,
    SH,
    SW,
    PH,
    PW,
    DH,
    DW,
    KH: tl.constexpr,
    KW: tl.constexpr,
    POINT: tl.constexpr,
    UNIT: tl.constexpr,
    AFFINE: tl.constexpr,
    PRE_ACT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y[m, n] = act(sum_tk pre(x[pixel(m, t), channel(k)]) w[n, t, k] + bias[n] + r[m, n])."""
    # One program makes BM pixels x BN output channels; neighbouring programs share their pixels.
    n_tiles = tl.cdiv(OC * V, BN)
    pid = tl.program_id(0)
    m = (pid // n_tiles) * BM + tl.arange(0, BM)
    n = (pid % n_tiles) * BN + tl.arange(0, BN)
    m_ok = m < M
    n_ok = n < OC * V
    row = tl.where(m_ok, m, 0)
    w_row = w_ptr + (tl.where(n_ok, n, 0) * (KH * KW * NKB * BK))[None, :]
    if UNIT:
        base = row * (XS * V)
    else:
        ow = row % OW
        oh = (row // OW) % OH
        image = row // OW // OH
        ih = oh * SH - PH
        iw = ow * SW - PW
        base = ((image * IH + ih) * IW + iw) * (XS * V)
    if not POINT:
        # Bit q says whether tap row (column) q lies inside the image.
        rows = tl.zeros((BM,), dtype=tl.int32)
        columns = tl.zeros((BM,), dtype=tl.int32)
        for q in tl.static_range(KH):
            rows |= tl.where((ih + q * DH >= 0) & (ih + q * DH < IH), 1 << q, 0)
        for q in tl.static_range(KW):
            columns |= tl.where((iw + q * DW >= 0) & (iw + q * DW < IW), 1 << q, 0)
        rows = tl.where(m_ok, rows, 0)

    k = tl.arange(0, BK)
    group = tl.load(groups_ptr + k // G)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    kb = 0
    kh = 0
    kw = 0
    for i in range(KH * KW * NKB):
        last = kb + 1 == NKB
        next_kb = tl.where(last, 0, kb + 1)
        channel = group * G + k % G
        group = tl.load(groups_ptr + next_kb * (BK // G) + k // G)
        if POINT:
            a = tl.load(x_ptr + base[:, None] + channel[None, :])
        else:
            tap = (kh * DH * IW + kw * DW) * XS * V
            inside = (((rows >> kh) & (columns >> kw) & 1) != 0)[:, None]
            a = tl.load(x_ptr + base[:, None] + (channel + tap)[None, :], mask=inside, other=0.0)
        if AFFINE or PRE_ACT != "none":
            v = a.to(tl.float32)
            if AFFINE:
                scale = tl.load(scale_ptr + kb * BK + k).to(tl.float32)
                shift = tl.load(shift_ptr + kb * BK + k).to(tl.float32)
                v = v * scale[None, :] + shift[None, :]
            v = activate(v, PRE_ACT)
            if not POINT:
                v = tl.where(inside, v, 0.0)
            a = v.to(x_ptr.dtype.element_ty)
        b = tl.load(w_row + (i * BK + k)[:, None])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        kb = next_kb
        if not POINT:
            kw = tl.where(last, kw + 1, kw)
            wrap = kw == KW
            kw = tl.where(wrap, 0, kw)
            kh = tl.where(wrap, kh + 1, kh)

    if BIAS:
        acc += tl.load(bias_ptr + tl.where(n_ok, n, 0)).to(tl.float32)[None, :]
    ok = m_ok[:, None] & n_ok[None, :]
    y = y_ptr + (m * (YS * V))[:, None] + n[None, :]
    if RESIDUAL == "add":
        acc += tl.load(r_ptr + (m * (RS * V))[:, None] + n[None, :], mask=ok, other=0.0).to(tl.float32)
    elif RESIDUAL == "accumulate":
        acc += tl.load(y, mask=ok, other=0.0).to(tl.float32)
    acc = activate(acc, ACT)
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=DEPTHWISE_SIZES)
def depthwise_nhwc(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    r_ptr,
    y_ptr,
    groups_ptr,
    M,
    IH,
    IW,
    OH,
    OW,
    XS,
    YS,
    RS,
    OC,
    SH,
    SW,
    PH,
    PW,
    DH,
    DW,
    KH: tl.constexpr,
    KW: tl.constexpr,
    AFFINE: tl.constexpr,
    PRE_ACT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y[m, c] = act(sum_t pre(x[pixel(m, t), channel(c)]) w[t, c] + bias[c] + r[m, c])."""
    n_tiles = tl.cdiv(OC * V, BN)
    pid = tl.program_id(0)
    m = (pid // n_tiles) * BM + tl.arange(0, BM)
    first = (pid % n_tiles) * BN
    c = first + tl.arange(0, BN)
    m_ok = m < M
    c_ok = c < OC * V
    row = tl.where(m_ok, m, 0)
    ow = row % OW
    oh = (row // OW) % OH
    image = row // OW // OH
    ih = oh * SH - PH
    iw = ow * SW - PW
    base = ((image * IH + ih) * IW + iw) * (XS * V)
    # The last group stands in for those beyond the end.
    slot = tl.minimum(first // G + tl.arange(0, BN) // G, OC * V // G - 1)
    channel = tl.load(groups_ptr + slot) * G + tl.arange(0, BN) % G
    if AFFINE:
        scale = tl.load(scale_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + c, mask=c_ok, other=0.0).to(tl.float32)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for kh in tl.static_range(KH):
        for kw in tl.static_range(KW):
            inside = m_ok & (ih + kh * DH >= 0) & (ih + kh * DH < IH) & (iw + kw * DW >= 0) & (iw + kw * DW < IW)
            tap = (kh * DH * IW + kw * DW) * XS * V
            v = tl.load(x_ptr + (base + tap)[:, None] + channel[None, :], mask=inside[:, None], other=0.0)
            v = v.to(tl.float32)
            if AFFINE:
                v = v * scale[None, :] + shift[None, :]
            if AFFINE or PRE_ACT != "none":
                v = activate(v, PRE_ACT)
                # The dense conv sees the prologue rounded to the network's type, and zeros around the image.
                v = tl.where(inside[:, None], v, 0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
            w = tl.load(w_ptr + (kh * KW + kw) * (OC * V) + c, mask=c_ok, other=0.0).to(tl.float32)
            acc += v * w[None, :]

    if BIAS:
        acc += tl.load(bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    ok = m_ok[:, None] & c_ok[None, :]
    y = y_ptr + (m * (YS * V))[:, None] + c[None, :]
    if RESIDUAL == "add":
        acc += tl.load(r_ptr + (m * (RS * V))[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
    elif RESIDUAL == "accumulate":
        acc += tl.load(y, mask=ok, other=0.0).to(tl.float32)
    acc = activate(acc, ACT)
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=POINT_SIZES)
def point_nchw(
    x_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    r_ptr,
    y_ptr,
    groups_ptr,
    P,
    XB,
    YB,
    RB,
    OC,
    NKB,
    AFFINE: tl.constexpr,
    PRE_ACT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y[b, o, p] = act(sum_k w[o, k] pre(x[b, channel(k), p]) + bias[o] + r[b, o, p])."""
    p_tiles = tl.cdiv(P * V, BN)
    pid = tl.program_id(0)
    image = tl.program_id(1)
    o = (pid // p_tiles) * BM + tl.arange(0, BM)
    p = (pid % p_tiles) * BN + tl.arange(0, BN)
    o_ok = o < OC
    p_ok = p < P * V
    w_row = w_ptr + (tl.where(o_ok, o, 0) * (NKB * BK))[:, None]
    x = x_ptr + image * XB * V
    k = tl.arange(0, BK)
    channel = tl.load(groups_ptr + k)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(NKB):
        plane = channel * (P * V)
        channel = tl.load(groups_ptr + tl.where(i + 1 == NKB, 0, i + 1) * BK + k)
        b = tl.load(x + plane[:, None] + p[None, :], mask=p_ok[None, :], other=0.0)
        if AFFINE or PRE_ACT != "none":
            v = b.to(tl.float32)
            if AFFINE:
                scale = tl.load(scale_ptr + i * BK + k).to(tl.float32)
                shift = tl.load(shift_ptr + i * BK + k).to(tl.float32)
                v = v * scale[:, None] + shift[:, None]
            b = activate(v, PRE_ACT).to(x_ptr.dtype.element_ty)
        a = tl.load(w_row + (i * BK + k)[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if BIAS:
        acc += tl.load(bias_ptr + tl.where(o_ok, o, 0)).to(tl.float32)[:, None]
    ok = o_ok[:, None] & p_ok[None, :]
    plane_of = (o * (P * V))[:, None] + p[None, :]
    y = y_ptr + image * YB * V + plane_of
    if RESIDUAL == "add":
        acc += tl.load(r_ptr + image * RB * V + plane_of, mask=ok, other=0.0).to(tl.float32)
    elif RESIDUAL == "accumulate":
        acc += tl.load(y, mask=ok, other=0.0).to(tl.float32)
    acc = activate(acc, ACT)
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=ok)


KERNELS = {"conv_nhwc": conv_nhwc, "depthwise_nhwc": depthwise_nhwc, "point_nchw": point_nchw}
SIZES = {"conv_nhwc": CONV_SIZES, "depthwise_nhwc": DEPTHWISE_SIZES, "point_nchw": POINT_SIZES}
POINTERS = ("x_ptr", "w_ptr", "bias_ptr", "scale_ptr", "shift_ptr", "r_ptr", "y_ptr", "groups_ptr")
