"""The specification: one plain torch function per operator, the only reference that tests and benchmarks use.

Arguments are the operators' own, in the same order; `dtype` (fp64 unless told) is what everything is computed
and returned in. T tokens, S = T·top_k routed rows, E experts, K in_features, N out_features, R rank. In
grouped order expert e owns rows expert_offsets[e-1] : expert_offsets[e]; the rows from expert_offsets[-1] on
belong to no expert. The forward functions are differentiable; the backward functions are formulas of their
own, not autograd's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _segments(expert_offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, one past its last row), in grouped order."""
    ends = expert_offsets.tolist()
    return list(zip(range(len(ends)), [0, *ends[:-1]], ends, strict=True))


def _to_grouped(rows: Tensor, slots: Tensor, top_k: int, *, per_token: bool, grouped: bool) -> Tensor:
    """Rows of any order → grouped order [S, ·]."""
    if grouped:
        return rows
    return rows[slots // top_k] if per_token else rows[slots]


def _to_slots(grouped: Tensor, slots: Tensor) -> Tensor:
    """[S, ·] in grouped order → [S, ·] in slot order."""
    return torch.zeros_like(grouped).index_copy(0, slots, grouped)


def _gate(gates: Tensor | None, slots: Tensor, lo: int, hi: int, dtype: torch.dtype) -> Tensor | float:
    """The gate of grouped rows lo:hi as a column, or 1."""
    return 1.0 if gates is None else gates.to(dtype).flatten()[slots[lo:hi]].unsqueeze(1)


def _nibbles(codes: Tensor, high_first: bool = False) -> Tensor:
    """uint8 [E, rows, columns/2] → 4-bit codes [E, rows, columns]."""
    pair = (codes >> 4, codes & 15) if high_first else (codes & 15, codes >> 4)
    return torch.stack(pair, dim=-1).flatten(-2).long()


def _e2m1(codes: Tensor) -> Tensor:
    """Sign, two bits of exponent, one of fraction; exponent 0 is subnormal."""
    exponent, fraction = (codes >> 1) & 3, (codes & 1) / 2
    size = torch.where(exponent == 0, fraction, (1 + fraction) * 2.0 ** (exponent - 1))
    return torch.where(codes < 8, size, -size).float()


def _e8m0(scale: Tensor) -> Tensor:
    return torch.where(scale == 255, math.nan, 2.0 ** (scale.double() - 127)).float()


def _dynamic_map() -> Tensor:
    """The values of nested scales: of each power of ten the middles of equal steps from 0.1 to 1,
    ascending.
    """
    values = [0.0, 1.0]
    for i in range(7):
        steps = torch.linspace(0.1, 1, 2**i + 1)
        values += [v for s in (1, -1) for v in (s * 10 ** (i - 6) * (steps[:-1] + steps[1:]) / 2).tolist()]
    return torch.tensor(sorted(values))


def _nested(scale: Tensor, scale2: Tensor | None) -> Tensor:
    """fp32 scales as they are; of uint8 ones every 256 have a row (factor, offset) of scale2."""
    if scale.dtype != torch.uint8:
        return scale
    factor, offset = scale2[torch.arange(scale.numel()) // 256].unbind(1)
    return (_dynamic_map().to(scale.device)[scale.flatten().long()] * factor + offset).view(scale.shape)


def _parts(scale2: Tensor, rows: int) -> Tensor:
    """[E, P] → [E, rows, 1], one for each of P equal parts of the rows."""
    return scale2[:, torch.arange(rows) * scale2.shape[1] // rows].unsqueeze(2)


def _cover(t: Tensor, sizes: tuple[int, int], block: int | None = None) -> Tensor:
    """[E, r, c] → [E, rows, columns]: each element for what it covers, equal shares or blocks."""
    for dim, size in zip((1, 2), sizes, strict=True):
        count = t.shape[dim]
        of = torch.arange(size, device=t.device)
        t = t.index_select(dim, of // block if block and 1 < count < size else of * count // size)
    return t


_NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
])  # fmt: skip
_FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12

# weight_format → (codes → values, scale and scale2 → scales for [E, rows, ·], what a scale covers if not
# equal shares), all in fp32.
FORMATS = {
    "nf4": (lambda codes: _NF4.to(codes.device)[_nibbles(codes, high_first=True)], _nested, None),
    "fp4": (lambda codes: _FP4.to(codes.device)[_nibbles(codes, high_first=True)], _nested, None),
    "int4": (lambda codes: _nibbles(codes).float(), lambda scale, _: scale, None),
    "mxfp4": (lambda codes: _e2m1(_nibbles(codes)), lambda scale, _: _e8m0(scale), None),
    "nvfp4": (
        lambda codes: _e2m1(_nibbles(codes)),
        lambda scale, scale2: scale.float() * _parts(scale2, scale.shape[1]),
        None,
    ),
    "int8": (lambda codes: codes.float(), lambda scale, _: scale, None),
    "fp8": (lambda codes: codes.float(), lambda scale, _: scale, 128),
}


def dense_weight(
    weight, weight_scale, weight_scale2, weight_zero, weight_format, weight_transposed, dtype
) -> Tensor:
    """W = (value(code) - zero)·scale, every operation rounded to fp32, then once to `dtype`, that of x: [E,
    N, K].

    A dense weight is that already. weight_transposed: everything stored is that of [E, K, N]. int4 without a
    zero has 8.
    """
    if weight_format == "dense":
        return weight
    values_of, scales_of, block = FORMATS[weight_format]
    values = values_of(weight)
    if weight_format == "int4":
        zero = torch.tensor(8) if weight_zero is None else _cover(weight_zero, values.shape[1:])
        values = values - zero.float()
    dense = values * _cover(scales_of(weight_scale, weight_scale2).float(), values.shape[1:], block)
    return (dense.transpose(1, 2) if weight_transposed else dense).to(dtype)


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """expert_idxs [T, top_k] → (slots in grouped order [S] int64, running counts [E] int32); sentinels
    last.
    """
    ids = expert_idxs.flatten().to(torch.int64)
    routed = (ids >= 0) & (ids < num_experts)
    keys = torch.where(routed, ids, num_experts)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    return torch.sort(keys, stable=True).indices, counts.cumsum(0).to(torch.int32)


def scatter_lora(
    x, weight, sorted_scattered_idxs, expert_offsets, top_k, lora_a=None, lora_b=None, scaling=1.0,
    bias=None, gates=None, x_grouped=False, y_grouped=False,
    weight_scale=None, weight_scale2=None, weight_zero=None, weight_format="dense", weight_transposed=False,
    sum_fp32=False, *, dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """y = x·W[e]ᵀ + scaling·(x·A[e]ᵀ)·B[e]ᵀ + bias[e] per routed row; with gates, their weighted sum per
    token. sum_fp32 is about the operator's dtype only.
    """
    packed = (weight_scale, weight_scale2, weight_zero, weight_format, weight_transposed)
    weight = dense_weight(weight, *packed, x.dtype)
    slots = sorted_scattered_idxs
    rows = _to_grouped(x.to(dtype), slots, top_k, per_token=True, grouped=x_grouped)
    parts = []
    end = 0
    for e, lo, end in _segments(expert_offsets):
        y = rows[lo:end] @ weight[e].to(dtype).T
        if lora_a is not None:
            y = y + scaling * (rows[lo:end] @ lora_a[e].to(dtype).T) @ lora_b[e].to(dtype).T
        if bias is not None:
            y = y + bias[e].to(dtype)
        parts.append(y * _gate(gates, slots, lo, end, dtype))
    parts.append(rows.new_zeros(slots.numel() - end, weight.shape[1]))
    grouped = torch.cat(parts)
    if y_grouped:
        return grouped
    y = _to_slots(grouped, slots)
    return y if gates is None else y.view(-1, top_k, y.shape[1]).sum(1)


def scatter_lora_dx(
    dy, weight, sorted_scattered_idxs, expert_offsets, top_k, lora_a=None, lora_b=None, scaling=1.0,
    bias=None, gates=None, x=None, x_grouped=False, y_grouped=False,
    weight_scale=None, weight_scale2=None, weight_zero=None, weight_format="dense", weight_transposed=False,
    sum_fp32=False, *, dtype=torch.float64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx = gate·(dy·W + scaling·(dy·B)·A), summed over a token's slots; dgates = ⟨dx before its gate, x⟩ +
    ⟨dy, bias⟩.
    """
    packed = (weight_scale, weight_scale2, weight_zero, weight_format, weight_transposed)
    weight = dense_weight(weight, *packed, dy.dtype)
    slots = sorted_scattered_idxs
    dy = _to_grouped(dy.to(dtype), slots, top_k, per_token=gates is not None, grouped=y_grouped)
    grouped = dy.new_zeros(slots.numel(), weight.shape[2])
    dgates = dy.new_zeros(slots.numel() if gates is not None and x is not None else 0)
    if dgates.numel():
        rows = _to_grouped(x.to(dtype), slots, top_k, per_token=True, grouped=x_grouped)
    for e, lo, hi in _segments(expert_offsets):
        d = dy[lo:hi] @ weight[e].to(dtype)
        if lora_a is not None:
            d = d + scaling * (dy[lo:hi] @ lora_b[e].to(dtype)) @ lora_a[e].to(dtype)
        grouped[lo:hi] = d * _gate(gates, slots, lo, hi, dtype)
        if dgates.numel():
            dgate = (d * rows[lo:hi]).sum(1)
            dgates[slots[lo:hi]] = dgate if bias is None else dgate + dy[lo:hi] @ bias[e].to(dtype)
    if not x_grouped:
        grouped = _to_slots(grouped, slots).view(-1, top_k, grouped.shape[1]).sum(1)
    return grouped, dgates.view(-1, top_k) if gates is not None and x is not None else dgates


def scatter_lora_dab(
    dy, x, sorted_scattered_idxs, expert_offsets, top_k, lora_a, lora_b, scaling=1.0, gates=None,
    x_grouped=False, y_grouped=False, *, dtype=torch.float64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dA[e] = scaling·(gate·dy·B)ᵀ·x, dB[e] = scaling·(gate·dy)ᵀ·(x·Aᵀ), over the rows of e."""
    slots = sorted_scattered_idxs
    rows = _to_grouped(x.to(dtype), slots, top_k, per_token=True, grouped=x_grouped)
    dy = _to_grouped(dy.to(dtype), slots, top_k, per_token=gates is not None, grouped=y_grouped)
    da, db = rows.new_zeros(lora_a.shape), rows.new_zeros(lora_b.shape)
    for e, lo, hi in _segments(expert_offsets):
        d = dy[lo:hi] * _gate(gates, slots, lo, hi, dtype)
        da[e] = scaling * (d @ lora_b[e].to(dtype)).T @ rows[lo:hi]
        db[e] = scaling * d.T @ (rows[lo:hi] @ lora_a[e].to(dtype).T)
    return da, db


def scatter_lora_backward(
    dy, x, weight, sorted_scattered_idxs, expert_offsets, top_k, lora_a, lora_b, scaling=1.0, bias=None,
    gates=None, x_grouped=False, y_grouped=False, with_dgates=True,
    weight_scale=None, weight_scale2=None, weight_zero=None, weight_format="dense", weight_transposed=False,
    sum_fp32=False, *, dtype=torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dgates, da, db) as scatter_lora_dx and scatter_lora_dab give them; dgates is empty where not
    wanted.
    """
    routing, lora = (sorted_scattered_idxs, expert_offsets, top_k), (lora_a, lora_b, scaling)
    orders = (x_grouped, y_grouped)
    rows = x if with_dgates else None
    packed = (weight_scale, weight_scale2, weight_zero, weight_format, weight_transposed, sum_fp32)
    dx = scatter_lora_dx(dy, weight, *routing, *lora, bias, gates, rows, *orders, *packed, dtype=dtype)
    return *dx, *scatter_lora_dab(dy, x, *routing, *lora, gates, *orders, dtype=dtype)


def scatter_lora_dw(
    dy, x, sorted_scattered_idxs, expert_offsets, top_k, gates=None, x_grouped=False, y_grouped=False,
    *, dtype=torch.float64,
) -> Tensor:  # fmt: skip
    """dW[e] = (gate·dy)ᵀ·x over the rows of e: [E, N, K]."""
    slots = sorted_scattered_idxs
    rows = _to_grouped(x.to(dtype), slots, top_k, per_token=True, grouped=x_grouped)
    dy = _to_grouped(dy.to(dtype), slots, top_k, per_token=gates is not None, grouped=y_grouped)
    dw = rows.new_zeros(expert_offsets.numel(), dy.shape[1], rows.shape[1])
    for e, lo, hi in _segments(expert_offsets):
        dw[e] = (dy[lo:hi] * _gate(gates, slots, lo, hi, dtype)).T @ rows[lo:hi]
    return dw


def scatter_lora_dbias(
    dy, sorted_scattered_idxs, expert_offsets, top_k, gates=None, y_grouped=False, *, dtype=torch.float64
) -> Tensor:
    """dbias[e] = Σ gate·dy over the rows of e: [E, N]."""
    slots = sorted_scattered_idxs
    dy = _to_grouped(dy.to(dtype), slots, top_k, per_token=gates is not None, grouped=y_grouped)
    dbias = dy.new_zeros(expert_offsets.numel(), dy.shape[1])
    for e, lo, hi in _segments(expert_offsets):
        dbias[e] = (dy[lo:hi] * _gate(gates, slots, lo, hi, dtype)).sum(0)
    return dbias


def _halves(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(gate columns, up columns) of h [rows, 2I]."""
    return (h[:, 0::2], h[:, 1::2]) if interleaved else tuple(h.chunk(2, dim=1))


def _activation(g: Tensor, act: str, alpha: float) -> tuple[Tensor, Tensor]:
    """f(g) and f'(g); at ±Inf their limits."""
    # `near` and z are g and its like within bounds past which f and f' have reached their limits.
    if act == "silu":
        near = g.clamp(-torch.finfo(g.dtype).max, torch.finfo(g.dtype).max)
        z = (alpha * near).clamp(-1000, 1000)
        s = torch.sigmoid(z)
        slope = s * (1 + z * (1 - s))
    elif act == "gelu":
        near = g.clamp(-64, 64)
        s = 0.5 * torch.erfc(-near / math.sqrt(2))
        slope = s + near * torch.exp(-0.5 * near * near) / math.sqrt(2 * math.pi)
    else:
        c, a = math.sqrt(2 / math.pi), 0.044715
        near = g.clamp(-32, 32)
        s = torch.sigmoid(2 * c * (near + a * near**3))  # (1 + tanh(z))/2 = σ(2z)
        slope = s + near * s * (1 - s) * 2 * c * (1 + 3 * a * near * near)
    return torch.where(s == 0, 0.0, g * s), slope


def glu(
    h, act="silu", alpha=1.0, limit=None, up_shift=0.0, interleaved=False, *, dtype=torch.float64
) -> Tensor:
    """f(min(g, limit))·(clamp(u, ±limit) + up_shift): h [rows, 2I] → [rows, I].

    silu: f(g) = g·σ(alpha·g), gelu: g·Φ(g), gelu_tanh: its approximation. Nothing overflows on the way to a
    finite result. An infinite g counts as the limit: f = 0 and f' = 0 at the end where f vanishes, f = ±Inf
    and f' = 1 at the other. NaN stays NaN. What f and f' are multiplied with follows arithmetic: 0·Inf is
    NaN, also where f has vanished in the computing type at a finite g.
    """
    g, u = _halves(h.to(dtype), interleaved)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return _activation(g, act, alpha)[0] * (u + up_shift)


def glu_backward(
    dy, h, act="silu", alpha=1.0, limit=None, up_shift=0.0, interleaved=False, *, dtype=torch.float64
) -> Tensor:
    """Gradient of `glu` with respect to h; a clamped element takes 0, whatever dy."""
    g, u = _halves(h.to(dtype), interleaved)
    dy = dy.to(dtype)
    g_in, u_in = g, u
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    f, df = _activation(g, act, alpha)
    # df is up to 1.13: halved, its product with dy is finite.
    dg, du = 2 * (dy * (0.5 * df) * (u + up_shift)), dy * f
    if limit is not None:
        dg, du = torch.where(g_in > limit, 0.0, dg), torch.where(u_in.abs() > limit, 0.0, du)
    return torch.stack((dg, du), dim=2).flatten(1) if interleaved else torch.cat((dg, du), dim=1)


REFERENCE = {
    "flatten_sort_count": flatten_sort_count,
    "scatter_lora": scatter_lora,
    "scatter_lora_dx": scatter_lora_dx,
    "scatter_lora_dab": scatter_lora_dab,
    "scatter_lora_backward": scatter_lora_backward,
    "scatter_lora_dw": scatter_lora_dw,
    "scatter_lora_dbias": scatter_lora_dbias,
    "glu": glu,
    "glu_backward": glu_backward,
}
