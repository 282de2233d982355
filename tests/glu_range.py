"""glu and glu_backward over the whole range of a dtype: inputs, and what comes of them exactly."""

from __future__ import annotations

import math

import numpy as np
import torch
from cases import BF16, FP16, FP32, FP64

# Past their zeros and their knees; alpha of either sign and none.
OPTIONS = {
    "SwiGLU": ("silu", 1.0, None, 0.0, False),
    "gpt_oss": ("silu", 1.702, 7.0, 1.0, True),
    "alpha below 0": ("silu", -0.5, 0.75, -2.0, True),
    "alpha of 0": ("silu", 0.0, None, 0.0, False),
    "GELU": ("gelu", 1.0, None, 0.0, False),
    "clamped GELU": ("gelu", 1.0, 1.0, 0.5, True),
    "GELU, tanh": ("gelu_tanh", 1.0, None, 0.0, False),
}
ROUNDOFF = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24, FP64: 2.0**-53}
# Halves are computed in fp32.
COMPUTED = {BF16: FP32, FP16: FP32, FP32: FP32, FP64: FP64}
# Where its e^-x vanishes: half of it is below the normal numbers.
LAST = {FP32: 174, FP64: 1416}
_EXACT = np.longdouble


def _magnitudes(dtype: torch.dtype, n: int) -> torch.Tensor:
    """`n` of each sign, log-spaced from the smallest subnormal to the largest number; 0, Inf and NaN."""
    info = torch.finfo(dtype)
    low, high = math.log2(info.smallest_normal * info.eps), math.log2(info.max)
    steps = [low + (high - low) * i / (n - 1) for i in range(n)]
    some = torch.tensor([2.0 ** min(s, 1023.999) for s in steps], dtype=FP64).clamp(max=info.max)
    some[-1] = info.max
    return torch.cat((some, -some, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=FP64)))


def inputs(dtype: torch.dtype, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, dy): every g with every u and every dy."""
    near = torch.tensor([0.7, 1.3, 5.0, 9.0, 12.9, 18.0, 26.0, 38.0, 52.0, 70.0, 87.5, 103.0, 150.0, 177.0])
    far = torch.tensor([700.0, 745.0, 1400.0, 1500.0])
    g = torch.cat((_magnitudes(dtype, 60), near, -near, far, -far))
    u, d = _magnitudes(dtype, 12), torch.cat((_magnitudes(dtype, 4), torch.tensor([1.0, -3e-4])))
    g, u, d = (t.flatten() for t in torch.meshgrid(g.to(dtype), u.to(dtype), d.to(dtype), indexing="ij"))
    width = u.numel() // 37 + 1
    g, u, d = (torch.cat((t, t[: 37 * width - t.numel()])).view(37, width) for t in (g, u, d))
    h = torch.stack((g, u), dim=2).flatten(1) if interleaved else torch.cat((g, u), dim=1)
    return h, d.contiguous()


def _activation(g: np.ndarray, act: str, alpha: float) -> tuple[np.ndarray, ...]:
    """(f, f', what g is multiplied with, its exponent): at ±Inf the limits."""
    finite = np.where(np.isinf(g), np.copysign(_EXACT(np.finfo(np.float64).max), g), g)
    if act == "gelu":
        bounded = np.abs(finite).astype(np.float64) / math.sqrt(2)
        tail = torch.special.erfcx(torch.from_numpy(bounded)).numpy().astype(_EXACT) / 2
        z = finite * finite / 2
        part = np.exp(-z) * tail
        s = np.where(finite < 0, part, 1 - part)
        slope = s + finite * np.exp(-z) / np.sqrt(2 * _EXACT(math.pi))
    else:
        c = 2 * math.sqrt(2 / math.pi)
        z = finite * alpha if act == "silu" else c * (finite + 0.044715 * finite**3)
        q = z if act == "silu" else c * (finite + 3 * 0.044715 * finite**3)
        e = np.exp(-np.abs(z))
        s, rest = np.where(z < 0, e, 1) / (1 + e), np.where(z < 0, 1, e) / (1 + e)
        slope = s + np.where(e == 0, 0, q * s * rest)
    return np.where(s == 0, 0 * finite, g * s), slope, s, np.abs(z)


def exact(h: torch.Tensor, dy: torch.Tensor, options: tuple, quantum: float, last: float) -> list[tuple]:
    """(values, error bounds, whether a factor may have vanished) of y, dg and du: nothing overflows on the
    way. `quantum` is what may be lost of f and f', and of their products with one of u and dy; from e^-last
    on f' may be 0.
    """
    act, alpha, limit, shift, interleaved = options
    g_in, u_in = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=1)
    g_in, u_in, d = (t.double().numpy().astype(_EXACT) for t in (g_in, u_in, dy))
    bound = math.inf if limit is None else limit
    g, u = np.minimum(g_in, bound), np.clip(u_in, -bound, bound)
    f, slope, s, z = _activation(g, act, alpha)
    tiny = torch.finfo(COMPUTED[h.dtype]).smallest_normal
    vanished = (s < 1e-70) | np.any([(np.abs(t) < tiny) & (t != 0) for t in (g, u, d)], axis=0)
    up, size = u + shift, np.abs(u) + abs(shift)
    accuracy = 8 * ROUNDOFF[COMPUTED[h.dtype]] * (1 + np.minimum(z, 1e4))
    dg, du = d * slope * up, d * f
    # f' crosses zero, and so does u + shift.
    d_size = np.abs(d) * (np.abs(slope) + np.minimum(1, np.exp(-z) * (1 + z))) * size
    most = np.fmax(1, np.fmax(np.abs(d), size)) * quantum
    tail = vanished | (np.abs(slope) * np.fmin(np.abs(d), np.abs(up)) < tiny)
    dg, du = np.where(g_in > bound, 0, dg), np.where(np.abs(u_in) > bound, 0, du)
    f_most = np.fmax(1, np.fmax(np.abs(d), np.abs(f))) * quantum
    return [
        (f * up, accuracy * np.abs(f) * size + most, vanished),
        (dg, accuracy * d_size + 4 * most + (1 + last) * np.exp(_EXACT(-last)) * np.abs(d) * size, tail),
        (du, accuracy * np.abs(du) + f_most, vanished),
    ]


def check(out: torch.Tensor, value: np.ndarray, bound: np.ndarray, vanished: np.ndarray, what: str) -> None:
    """One rounding more, to out's type; what is beyond its range is Inf. Of an infinite and a vanished factor
    comes Inf or NaN.
    """
    info = torch.finfo(out.dtype)
    got = out.double().numpy().astype(_EXACT)
    # vcvtneps2bf16 has no subnormals.
    least = info.smallest_normal * (1 if out.dtype == BF16 else info.eps)
    allowed = bound + ROUNDOFF[out.dtype] * np.abs(value) + least
    close = (got == value) | (np.abs(got - value) <= allowed)
    beyond = np.isinf(got) & (np.sign(got) == np.sign(value)) & (np.abs(value) + allowed >= info.max)
    good = np.where(np.isnan(value), np.isnan(got), close | beyond)
    good |= vanished & ~np.isfinite(value) & ~np.isfinite(got)
    if not good.all():
        at = tuple(np.argwhere(~good)[0])
        raise AssertionError(
            f"{what}: {(~good).sum()} wrong, at {at} {got[at]} for {value[at]} ± {allowed[at]}"
        )


@np.errstate(all="ignore")
def compare(
    y: torch.Tensor,
    dh: torch.Tensor,
    h: torch.Tensor,
    dy: torch.Tensor,
    options: tuple,
    quantum: float,
    last: float,
) -> None:
    """Results of glu and glu_backward with exact ones."""
    dg, du = (dh[:, 0::2], dh[:, 1::2]) if options[4] else dh.chunk(2, dim=1)
    for name, out, expected in zip(
        ("y", "dg", "du"), (y, dg, du), exact(h, dy, options, quantum, last), strict=True
    ):
        check(out, *expected, name)
