"""glu and glu_backward: one elementwise kernel each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..calls import Glu, GluBackward
from . import configs


@triton.jit
def within(x, BOUND: tl.constexpr):
    """x inside ±BOUND; NaN stays."""
    x = tl.minimum(x, BOUND, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -BOUND, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamped(g, u, LIMIT: tl.constexpr):
    """min(g, LIMIT) and u inside ±LIMIT."""
    if LIMIT is not None:
        g = tl.minimum(g, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        u = within(u, LIMIT)
    return g, u


@triton.jit
def scaled_tail(x):
    """e^(x²/2)·Φ(-x) of x ≥ 0, as in csrc/ukernel/glu.inl."""
    if x.dtype == tl.float64:
        t = 1 / (x + 5)
        s = 1 - 10 * t
        p = -8.166192624428987e-10 * s + 5.037302126379857e-10
        p = p * s + 9.446827519677366e-09
        p = p * s - 5.015649939857857e-09
        p = p * s - 6.782555313291156e-08
        p = p * s + 3.581840051543223e-08
        p = p * s + 4.340262594829775e-07
        p = p * s - 3.310698071526862e-07
        p = p * s - 2.769337871043854e-06
        p = p * s + 3.977912640593242e-06
        p = p * s + 1.6681099115863468e-05
        p = p * s - 4.976177118979218e-05
        p = p * s - 5.9375673286488655e-05
        p = p * s + 0.00054489883090093
        p = p * s - 0.0007978694094808063
        p = p * s - 0.00299337673822322
        p = p * s + 0.020795066800941616
        p = p * s - 0.06911863870881432
        p = p * s + 0.16502036617034282
        p = p * s - 0.3135331566712138
        p = p * s + 0.4953056159699768
        p = p * s - 0.6653825028900577
        p = p * s + 0.769193049750063
    else:
        t = 1 / (x + 3.5)
        s = 1 - 7 * t
        p = -4.9766888e-05 * s + 3.46352026e-05
        p = p * s + 0.00045269393
        p = p * s - 0.000417768606
        p = p * s - 0.00317898579
        p = p * s + 0.00646523386
        p = p * s + 0.0174060594
        p = p * s - 0.116049044
        p = p * s + 0.315425068
        p = p * s - 0.565561891
        p = p * s + 0.744416058
    return p * t


@triton.jit
def logistic(g, near, z, q):
    """g·σ(z) as `activation` gives it; q is g·z', `near` is g where g is finite and f has not vanished."""
    h = tl.exp(-0.5 * tl.abs(z))
    e = h * h
    r = 1 / (1 + e)
    tail = z < 0
    half_slope = 0.5 * r * (1 + q * r * tl.where(tail, 1.0, e))
    return tl.where(tail, near * h, g) * r, tl.where(tail, h, 1.0), half_slope


@triton.jit
def activation(g, ALPHA: tl.constexpr, ACT: tl.constexpr):
    """(value, scale, half_slope): f(g) = value·scale, f'(g) = 2·half_slope·scale².

    Where f vanishes, scale is the root of the e^-… that it vanishes with, else 1, so that nothing over- or
    underflows on the way to a result that does not. At ±Inf f and f' are their limits.
    """
    if ACT == "silu":
        near = within(g, 1.7976931348623157e308 if g.dtype == tl.float64 else 3.4028234663852886e38)
        z = within(ALPHA * near, 2000.0)
        value, scale, half_slope = logistic(g, near, z, z)
    elif ACT == "gelu":
        near = within(g, 64.0)
        x = tl.abs(near)
        t = scaled_tail(x)
        h = tl.exp(-0.25 * x * x)
        e = h * h
        q = x * 0.3989422804014327 - t
        tail = g < 0
        value, scale = tl.where(tail, near * h * t, g * (1 - e * t)), tl.where(tail, h, 1.0)
        half_slope = 0.5 * tl.where(tail, -q, 1 + e * q)
    else:
        near = within(g, 32.0)
        k, c = 1.5957691216057308 * near, 0.044715 * near * near  # (1 + tanh z)/2 = σ(2z)
        value, scale, half_slope = logistic(g, near, k * (1 + c), k * (1 + 3 * c))
    return value, scale, half_slope


@triton.jit(do_not_specialize=["rows"])
def glu_forward(
    h, y, rows, inner, h_m, h_n, up,
    STEP: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(rows, BLOCK_M) · cdiv(inner, BLOCK_N),). y = f(g)·(u + SHIFT).

    h  [rows, 2·inner]: g in column c·STEP, u in column c·STEP + up
    y  [rows, inner] contiguous
    """
    ACC: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    blocks_n = tl.cdiv(inner, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = (m < rows)[:, None] & (n < inner)[None, :]
    m, n = m.to(tl.int64), n.to(tl.int64)  # int64: rows·stride, 2·inner·stride
    at = h + m[:, None] * h_m
    g = tl.load(at + (n * STEP)[None, :] * h_n, mask=kept, other=0.0).to(ACC)  # [BM, BN]
    u = tl.load(at + (n * STEP + up)[None, :] * h_n, mask=kept, other=0.0).to(ACC)  # [BM, BN]
    g, u = clamped(g, u, LIMIT)
    value, scale, _ = activation(g, ALPHA, ACT)
    f_u = value * (scale * (u + SHIFT))
    tl.store(y + m[:, None] * inner + n[None, :], f_u.to(y.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["rows"])
def glu_gradient(
    dy, h, dh, rows, inner, dy_m, dy_n, h_m, h_n, up,
    STEP: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(rows, BLOCK_M) · cdiv(inner, BLOCK_N),). A clamped element takes no gradient.

    dy [rows, inner]
    h  [rows, 2·inner]: g in column c·STEP, u in column c·STEP + up
    dh [rows, 2·inner] contiguous, as h
    """
    ACC: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    blocks_n = tl.cdiv(inner, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = (m < rows)[:, None] & (n < inner)[None, :]
    m, n = m.to(tl.int64), n.to(tl.int64)  # int64: rows·stride, 2·inner·stride
    at = h + m[:, None] * h_m
    g_in = tl.load(at + (n * STEP)[None, :] * h_n, mask=kept, other=0.0).to(ACC)  # [BM, BN]
    u_in = tl.load(at + (n * STEP + up)[None, :] * h_n, mask=kept, other=0.0).to(ACC)  # [BM, BN]
    d = tl.load(dy + m[:, None] * dy_m + n[None, :] * dy_n, mask=kept, other=0.0).to(ACC)  # [BM, BN]
    g, u = clamped(g_in, u_in, LIMIT)
    value, scale, half_slope = activation(g, ALPHA, ACT)
    d *= scale
    dg, du = 2 * (d * half_slope * ((u + SHIFT) * scale)), d * value
    if LIMIT is not None:
        dg = tl.where(g_in > LIMIT, 0.0, dg)
        du = tl.where(tl.abs(u_in) > LIMIT, 0.0, du)
    at = dh + m[:, None] * (2 * inner) + (n * STEP)[None, :]
    tl.store(at, dg.to(dh.dtype.element_ty), mask=kept)
    tl.store(at + up, du.to(dh.dtype.element_ty), mask=kept)


def _launch(kernel: Callable, tensors: tuple, strides: tuple, call: Glu | GluBackward) -> None:
    h, limit = call.h, call.limit
    rows, inner = h.shape[0], h.shape[1] // 2
    if rows == 0:
        return
    block_m, block_n = configs.elementwise(configs.machine(h.device), inner, h.dtype)
    grid = (configs.cdiv(rows, block_m) * configs.cdiv(inner, block_n),)
    step, up = (2, 1) if call.interleaved else (1, inner)
    kernel[grid](
        *tensors, rows, inner, *strides, up, STEP=step, ACT=call.act, ALPHA=call.alpha,
        LIMIT=None if limit is None or math.isinf(limit) else limit, SHIFT=call.up_shift,
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip


def glu(call: Glu) -> Tensor:
    """f(min(g, limit))·(clamp(u, ±limit) + up_shift): [rows, 2I] → [rows, I]."""
    checks.glu(call)
    h = call.h
    y = torch.empty((h.shape[0], h.shape[1] // 2), dtype=h.dtype, device=h.device)
    _launch(glu_forward, (h, y), h.stride(), call)
    return y


def glu_backward(call: GluBackward) -> Tensor:
    """dh [rows, 2I]."""
    checks.glu_backward(call)
    dy, h = call.dy, call.h
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    _launch(glu_gradient, (dy, h, dh), (*dy.stride(), *h.stride()), call)
    return dh
