"""Tensors for a `Case`, calls with poisoned outputs, and the comparison with the reference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from cases import BF16, FP16, FP32, FP64, HALVES, Case
from packings import build as build_packed
from torch import Tensor

import torch_moelora  # noqa: F401  (defines torch.ops.moelora)
from torch_moelora import calls, reference
from torch_moelora.formats import PackedWeight

# ‖out − ref‖ / ‖ref‖. Half types: one rounding of the result, one of x·Aᵀ or dy·B.
TOLERANCE = {BF16: 3e-3, FP16: 5e-4, FP32: 2e-6, FP64: 1e-13}
# A and B are rounded as well when they enter the matrix units.
TOLERANCE_FP32_LORA = {BF16: 4e-3, FP16: 6e-4}


@dataclass
class Problem:
    """The tensors of one call; `None` where the case has none. dy fits the case's output. Of a packed weight
    `weight` is its codes.
    """

    case: Case
    x: Tensor
    weight: Tensor
    slots: Tensor
    offsets: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None
    gates: Tensor | None
    dy: Tensor
    packed: PackedWeight | None = None

    @property
    def packed_args(self) -> tuple:
        """What stands behind all other arguments where the weight is packed."""
        return () if self.packed is None else self.packed[1:]

    @property
    def routing(self) -> tuple:
        return self.slots, self.offsets, self.case.top_k

    @property
    def orders(self) -> tuple:
        return self.case.x_grouped, self.case.y_grouped

    def forward_args(self) -> tuple:
        return (
            self.x, self.weight, *self.routing, self.lora_a, self.lora_b, self.case.scaling, self.bias,
            self.gates, *self.orders, *self.packed_args,
        )  # fmt: skip

    def dx_args(self, with_x: bool = True) -> tuple:
        return (
            self.dy, self.weight, *self.routing, self.lora_a, self.lora_b, self.case.scaling, self.bias,
            self.gates, self.x if with_x else None, *self.orders, *self.packed_args,
        )  # fmt: skip

    def dab_args(self) -> tuple:
        return (
            self.dy, self.x, *self.routing, self.lora_a, self.lora_b, self.case.scaling, self.gates,
            *self.orders,
        )  # fmt: skip

    def backward_args(self) -> tuple:
        return (
            self.dy, self.x, self.weight, *self.routing, self.lora_a, self.lora_b, self.case.scaling,
            self.bias, self.gates, *self.orders,
        )  # fmt: skip

    def dw_args(self) -> tuple:
        return self.dy, self.x, *self.routing, self.gates, *self.orders

    def dbias_args(self) -> tuple:
        return self.dy, *self.routing, self.gates, self.case.y_grouped


def _normal(gen: torch.Generator, shape: tuple, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=gen, dtype=FP64) * std).to(dtype)


def on_meta(t: Tensor) -> Tensor:
    """Shape, strides and dtype, which `to("meta")` would make dense."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def weight_like(values: Tensor, layout: str) -> Tensor:
    """The same values [E, N, K] behind other strides."""
    e, n, k = values.shape
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expert_fastest":
        return values.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout == "shared":
        return values[:1].expand(e, n, k)
    if layout == "padded":
        view = values.new_full((e, n, k + 5), math.nan)[:, :, :k]
    elif layout == "sliced":
        view = values.new_full((e + 2, n + 3, k + 4), math.nan)[1 : e + 1, 2 : n + 2, 3 : k + 3]
    elif layout == "strided":
        view = values.new_full((e, 2 * n, 3 * k), math.nan)[:, ::2, 1::3]
    else:
        raise ValueError(layout)
    return view.copy_(values)


def lora_like(a: Tensor, b: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A [E, R, K] and B [E, N, R] as PEFT stores them, or as `weight_like` does."""
    if layout != "peft":
        return weight_like(a, layout), weight_like(b, layout)
    e, r, k = a.shape
    n = b.shape[1]
    stored_b = b.permute(1, 2, 0).reshape(n, r * e)
    return a.reshape(e * r, k).view(e, r, k), stored_b.view(n, r, e).permute(2, 0, 1)


def rows_like(values: Tensor, layout: str) -> Tensor:
    """The same values [rows, columns] behind other strides; "expanded" repeats the first row."""
    rows, columns = values.shape
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "expanded":
        return values[:1].expand(rows, columns)
    if layout == "columns":
        view = values.new_full((rows, columns + 7), math.nan)[:, 3 : columns + 3]
    elif layout == "rows":
        view = values.new_full((2 * rows, columns), math.nan)[::2]
    else:
        raise ValueError(layout)
    return view.copy_(values)


def expert_ids(case: Case, gen: torch.Generator) -> Tensor:
    """[T, top_k] for the case's routing."""
    shape = (case.tokens, case.top_k)
    low, high = 0, case.experts
    if case.routing == "one_expert":
        low = case.experts - 1
    elif case.routing == "few_experts":
        high = max(1, case.experts // 3)
    elif case.routing == "sentinels":
        low, high = -2, case.experts + 2
    elif case.routing == "all_sentinels":
        low, high = case.experts, case.experts + 3
    return torch.randint(low, high, shape, generator=gen).to(case.index_dtype)


def build(case: Case) -> Problem:
    """Unit-normal x and dy, weights that keep the variance, gates that sum to about one."""
    gen = torch.Generator().manual_seed(case.seed)
    e, n, k, r = case.experts, case.n, case.k, case.rank
    kinds = {"none": None, "same": case.dtype, "fp32": FP32}
    slots, offsets = reference.flatten_sort_count(expert_ids(case, gen), e)
    x = _normal(gen, (case.rows if case.x_grouped else case.tokens, k), case.dtype)
    weight = _normal(gen, (e, n, k), case.dtype, k**-0.5)
    lora_a = lora_b = bias = gates = None
    if r:
        a = _normal(gen, (e, r, k), kinds[case.lora], k**-0.5)
        b = _normal(gen, (e, n, r), kinds[case.lora], r**-0.5)
        lora_a, lora_b = lora_like(a, b, case.lora_layout)
    if case.bias != "none":
        bias = _normal(gen, (e, n), kinds[case.bias])
    if case.gates != "none":
        gates = torch.rand((case.tokens, case.top_k), generator=gen, dtype=FP64).to(kinds[case.gates])
    dy = _normal(gen, (case.rows if gates is None else case.tokens, n), case.dtype)
    packed = None if case.packing is None else build_packed(case.packing, e, n, k, gen)
    weight = weight_like(weight, case.weight_layout) if packed is None else packed.codes
    return Problem(
        case, rows_like(x, case.x_layout), weight, slots, offsets,
        lora_a, lora_b, bias, gates, rows_like(dy, case.dy_layout), packed,
    )  # fmt: skip


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors start as NaN (the largest integer for integers), so that an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def call(name: str, *args):
    """The operator itself, with poisoned outputs."""
    with poisoned():
        return getattr(torch.ops.moelora, name)(*args)


def with_dense_weight(name: str, args: tuple) -> tuple:
    """The same call of operator `name` on the numbers that a packed weight stands for."""
    call = calls.CALLS[name](*args)
    if getattr(call, "weight_format", "dense") == "dense":
        return args
    packed = {f: getattr(call, f) for f in call._fields if f.startswith("weight")}
    dense = reference.dense_weight(*packed.values(), call[0].dtype)
    defaults = {f: call._field_defaults[f] for f in packed if f != "weight"}
    return tuple(call._replace(weight=dense, **defaults))


def _squares(args: tuple) -> tuple:
    return tuple(
        a.double().square() if isinstance(a, Tensor) and a.is_floating_point()
        else a * a if isinstance(a, float) else a
        for a in args
    )  # fmt: skip


def magnitudes(name: str, args: tuple) -> tuple[Tensor, ...]:
    """The root of the sum of squares of all terms of each result.

    The operators are multilinear, so this is the reference on squared arguments. It is the size of a result
    whose
    terms do not happen to cancel: the right scale for rounding errors of few elements.
    """
    out = reference.REFERENCE[name](*_squares(with_dense_weight(name, args)))
    return tuple(t.sqrt() for t in (out if isinstance(out, tuple) else (out,)))


def tolerance(case: Case, elements: int) -> float:
    """Bound on the norm-relative error; wider where a handful of roundings has nothing to average out with.

    One rounded element of x·Aᵀ or dy·B [S, R] is in a whole row of the result, so these count as well, and so
    does one of gate·dy [S, N]. Of equal rows an expert has one row of x·Aᵀ only.
    """
    base = TOLERANCE[case.dtype]
    if case.rank and case.lora == "fp32" and case.dtype in HALVES:
        base = TOLERANCE_FP32_LORA[case.dtype]
    alike = "expanded" in (case.x_layout, case.dy_layout)
    rows = min(case.rows, case.experts) if alike else case.rows
    roundings = min(elements, rows * case.rank) if case.rank else elements
    if case.gates != "none":
        roundings = min(roundings, case.rows * case.n)
    return base * (1 + 2 / math.sqrt(max(roundings, 1)))


def rounding_of(ref: Tensor, dtype: torch.dtype) -> float:
    """‖round(ref) − ref‖, of what does not overflow."""
    rounded = ref.to(dtype).double()
    return (rounded - ref).where(rounded.isfinite(), 0).norm().item()


def assert_close(out: Tensor, ref: Tensor, magnitude: Tensor, tol: float, what: str) -> None:
    """Whole, row by row, and exact zeros where the reference has them.

    `tol` is meant for roundings that average out. Those of equal rows do not, nor where few elements outweigh
    the others: there the bound is what a correct operator cannot stay below. Its result is round(ref + δ),
    with δ the error of the accumulation, and |round(ref + δ) − ref| ≤ |round(ref) − ref| + 2|δ|.
    """
    assert out.shape == ref.shape, f"{what}: shape {list(out.shape)}, reference {list(ref.shape)}"
    # dB may have the order of PEFT's B.
    assert out.is_contiguous() or (out.dim() == 3 and out.permute(1, 2, 0).is_contiguous()), what
    if not out.numel():
        return
    assert not out.isnan().any(), f"{what}: NaN (an element that was never written?)"
    assert (out[ref == 0] == 0).all(), f"{what}: not zero where the reference is"
    error = out.double() - ref
    scale = max(ref.norm().item(), magnitude.norm().item())
    accumulation = TOLERANCE[FP64 if out.dtype == FP64 else FP32] * scale
    allowed = max(tol * scale, rounding_of(ref, out.dtype) + 2 * accumulation)
    found = error.norm().item()
    assert found <= allowed, f"{what}: error {found / scale:.2e} > {allowed / scale:.2e}"
    rows = error.reshape(-1, error.shape[-1]).norm(dim=1)
    sizes = magnitude.reshape(-1, error.shape[-1]).norm(dim=1)
    sizes = torch.maximum(sizes, ref.reshape(-1, error.shape[-1]).norm(dim=1))
    worst = (rows / sizes.clamp_min(1e-300)).max().item()
    assert worst <= 3 * tol * (1 + 2 / math.sqrt(error.shape[-1])), f"{what}: a row is off by {worst:.2e}"


def check(name: str, args: tuple, case: Case, dtypes: tuple[torch.dtype, ...]) -> None:
    """Calls operator `name` and compares every result with the reference, dtypes included."""
    out = call(name, *args)
    ref = reference.REFERENCE[name](*args)
    outs, refs = (out, ref) if isinstance(out, tuple) else ((out,), (ref,))
    sizes = magnitudes(name, args)
    for i, (o, r, m, dtype) in enumerate(zip(outs, refs, sizes, dtypes, strict=True)):
        assert o.dtype == dtype, f"{name}[{i}] has dtype {o.dtype}, not {dtype}"
        assert_close(o, r, m, tolerance(case, o.numel()), f"{name}[{i}]")
