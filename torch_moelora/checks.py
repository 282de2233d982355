"""Argument checks, used by the fakes and by the CUDA implementations; the CPU operators use the same wording.

One form for every message: `<op>: <argument> must <expected>, got <what came>`. The checks of an operator run
in one order everywhere (routing, then tensors in the order of the schema, then scalars), so that a call with
two mistakes reports the same one on every backend. Everything raises RuntimeError, as TORCH_CHECK does in
C++.

Nothing here reads a tensor's contents: on CUDA that would synchronise, and a fake has none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import formats, weight_checks
from .calls import (
    FlattenSortCount,
    Glu,
    GluBackward,
    ScatterLora,
    ScatterLoraBackward,
    ScatterLoraDab,
    ScatterLoraDbias,
    ScatterLoraDw,
    ScatterLoraDx,
)
from .weight_checks import require

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ACTS = ("silu", "gelu", "gelu_tanh")
# Rows are counted in int32: expert_offsets.
MOST_ROWS = 2**31 - 1
# The running counts and the sort's own take 12 bytes an expert: a number that nobody meant would end the
# process.
MOST_EXPERTS = 2**24


def text(t: Tensor) -> str:
    """The shape as messages print it: `[4, 8]`."""
    return "[" + ", ".join(str(d) for d in t.shape) + "]"


def _dim(op: str, name: str, t: Tensor, dim: int, letters: str) -> None:
    require(t.dim() == dim, lambda: f"{op}: {name} must be a {dim}-D tensor [{letters}], got shape {text(t)}")


def _shape(op: str, name: str, t: Tensor, expected: tuple, why: str) -> None:
    """`expected` may hold strings for free dimensions. One check a dimension: unbacked sizes stay
    traceable.
    """

    def message() -> str:
        return f"{op}: {name} must have shape [{', '.join(map(str, expected))}] ({why}), got {text(t)}"

    require(t.dim() == len(expected), message)
    for size, want in zip(t.shape, expected, strict=True):
        if not isinstance(want, str):
            require(size == want, message)


def _float(op: str, name: str, t: Tensor) -> None:
    require(
        t.dtype in FLOATS,
        lambda: (
            f"{op}: {name} must have dtype torch.bfloat16, torch.float16, torch.float32 or torch.float64, "
            f"got {t.dtype}"
        ),
    )


def _like(op: str, name: str, t: Tensor, lead_name: str, lead: Tensor, or_float32: bool = False) -> None:
    """Same device as `lead`, and its dtype; with `or_float32` a half-precision lead also takes float32."""
    require(
        t.device == lead.device,
        lambda: f"{op}: {name} must be on device {lead.device} (that of {lead_name}), got {t.device}",
    )
    or_float32 = or_float32 and lead.dtype in (torch.bfloat16, torch.float16)
    alternative = " or torch.float32" if or_float32 else ""
    require(
        t.dtype == lead.dtype or (or_float32 and t.dtype == torch.float32),
        lambda: (
            f"{op}: {name} must have dtype {lead.dtype} (that of {lead_name}){alternative}, got {t.dtype}"
        ),
    )


def _index(op: str, name: str, t: Tensor, letter: str, dtype: torch.dtype) -> None:
    _dim(op, name, t, 1, letter)
    require(t.dtype == dtype, lambda: f"{op}: {name} must have dtype {dtype}, got {t.dtype}")


def _countable(rows: int | torch.SymInt) -> bool:
    """Not asked of a symbolic size, which it would bound in an exported program: the operator asks when it
    runs.
    """
    return not isinstance(rows, int) or rows <= MOST_ROWS


def _routing(op: str, call: NamedTuple, lead_name: str) -> None:
    lead, top_k = getattr(call, lead_name), call.top_k
    slots, offsets = call.sorted_scattered_idxs, call.expert_offsets
    require(top_k >= 1, lambda: f"{op}: top_k must be at least 1, got {top_k}")
    _index(op, "sorted_scattered_idxs", slots, "S", torch.int64)
    require(
        slots.shape[0] % top_k == 0,
        lambda: (
            f"{op}: sorted_scattered_idxs must have a length that is a multiple of top_k={top_k}, "
            f"got {slots.shape[0]}"
        ),
    )
    require(
        _countable(slots.shape[0]),
        lambda: (
            f"{op}: sorted_scattered_idxs must have a length of at most {MOST_ROWS}, got {slots.shape[0]}"
        ),
    )
    _index(op, "expert_offsets", offsets, "E", torch.int32)
    require(
        offsets.shape[0] >= 1,
        lambda: f"{op}: expert_offsets must have a length of at least 1, got {offsets.shape[0]}",
    )
    for name, t in (("sorted_scattered_idxs", slots), ("expert_offsets", offsets)):
        require(
            t.device == lead.device,
            lambda name=name, t=t: (
                f"{op}: {name} must be on device {lead.device} (that of {lead_name}), got {t.device}"
            ),
        )


def _rows(op: str, call: NamedTuple, name: str, per_slot: bool, flag: str) -> None:
    """The first dimension is S where `per_slot`, else T = S / top_k; `flag` says what decided it."""
    t, total, top_k = getattr(call, name), call.sorted_scattered_idxs.shape[0], call.top_k

    def message() -> str:
        letter, rows = ("S", total) if per_slot else ("T", total // top_k)
        return f"{op}: {name} must have {rows} rows ({letter}, because {flag}), got shape {text(t)}"

    require(t.shape[0] * (1 if per_slot else top_k) == total, message)


def _x(op: str, call: NamedTuple) -> None:
    _dim(op, "x", call.x, 2, "S, K" if call.x_grouped else "T, K")
    _rows(op, call, "x", call.x_grouped, f"x_grouped is {call.x_grouped}")


def _dy(op: str, call: NamedTuple) -> None:
    per_slot = call.gates is None
    _dim(op, "dy", call.dy, 2, "S, N" if per_slot else "T, N")
    _rows(op, call, "dy", per_slot, "gates is None" if per_slot else "gates is given")
    _float(op, "dy", call.dy)


def _dense_weight(op: str, call: NamedTuple, lead_name: str) -> None:
    weight, experts = call.weight, call.expert_offsets.shape[0]
    _dim(op, "weight", weight, 3, "E, N, K")
    _like(op, "weight", weight, lead_name, getattr(call, lead_name))
    require(
        weight.shape[0] == experts,
        lambda: (
            f"{op}: weight must have {experts} experts (the length of expert_offsets), "
            f"got shape {text(weight)}"
        ),
    )
    for size in weight.shape[1:]:
        require(size >= 1, lambda: f"{op}: weight must have N and K of at least 1, got shape {text(weight)}")


def _packed_weight(op: str, call: NamedTuple, lead_name: str) -> None:
    lead = getattr(call, lead_name)
    require(
        lead.dtype != torch.float64,
        lambda: (
            f"{op}: {lead_name} must have dtype torch.bfloat16, torch.float16 or torch.float32 when "
            f"weight_format is {call.weight_format}, got {lead.dtype}"
        ),
    )
    require(
        call.weight.device == lead.device,
        lambda: (
            f"{op}: weight must be on device {lead.device} (that of {lead_name}), got {call.weight.device}"
        ),
    )


def _weight(op: str, call: NamedTuple, lead_name: str) -> tuple[int, int, int]:
    """(E, N, K)."""
    row = formats.lookup(op, call.weight_format, "weight_format")
    dense = row.bits is None
    (_dense_weight if dense else _packed_weight)(op, call, lead_name)
    weight = weight_of(call)
    weight_checks.packed(op, row, weight, weight_checks.ARGUMENTS, call.expert_offsets.shape[0])
    return weight.shape


def weight_of(call: NamedTuple) -> formats.PackedWeight:
    """The weight of a call, from the arguments that are one."""
    return formats.PackedWeight(
        call.weight, call.weight_scale, call.weight_scale2, call.weight_zero,
        call.weight_format, call.weight_transposed,
    )  # fmt: skip


def _columns(op: str, name: str, t: Tensor, letter: str, size: int) -> None:
    require(
        t.shape[1] == size,
        lambda: f"{op}: {name} must have {size} columns ({letter} of weight), got shape {text(t)}",
    )


def _lora(op: str, call: NamedTuple, lead_name: str, sizes: tuple) -> None:
    """`sizes` is (E, N, K)."""
    a, b = call.lora_a, call.lora_b
    e, n, k = sizes
    _shape(op, "lora_a", a, (e, "R", k), f"E={e}, K={k}")
    require(a.shape[1] >= 1, lambda: f"{op}: lora_a must have a rank R of at least 1, got shape {text(a)}")
    require(k >= 1, lambda: f"{op}: lora_a must have a K of at least 1, got shape {text(a)}")
    _like(op, "lora_a", a, lead_name, getattr(call, lead_name), or_float32=True)
    r = a.shape[1]
    _shape(op, "lora_b", b, (e, n, r), f"E={e}, N={n}, R={r} of lora_a")
    require(n >= 1, lambda: f"{op}: lora_b must have an N of at least 1, got shape {text(b)}")
    _like(op, "lora_b", b, "lora_a", a)


def _lora_pair(op: str, call: NamedTuple, lead_name: str, sizes: tuple) -> None:
    a, b = call.lora_a, call.lora_b
    require(
        (a is None) == (b is None),
        lambda: (
            f"{op}: lora_a and lora_b must be given together, got only {'lora_b' if a is None else 'lora_a'}"
        ),
    )
    if a is not None:
        _lora(op, call, lead_name, sizes)


def _bias(op: str, call: NamedTuple, lead_name: str, e: int, n: int) -> None:
    if call.bias is None:
        return
    _shape(op, "bias", call.bias, (e, n), f"E={e}, N={n}")
    _like(op, "bias", call.bias, lead_name, getattr(call, lead_name), or_float32=True)


def _gates(op: str, call: NamedTuple, lead_name: str) -> None:
    gates, top_k, total = call.gates, call.top_k, call.sorted_scattered_idxs.shape[0]
    if gates is None:
        return
    require(
        not call.y_grouped,
        lambda: f"{op}: gates must be None when y_grouped is True, got shape {text(gates)}",
    )

    def message() -> str:
        return (
            f"{op}: gates must have shape [{total // top_k}, {top_k}] (T=S/top_k, top_k), got {text(gates)}"
        )

    require(gates.dim() == 2, message)
    require(gates.shape[1] == top_k, message)
    require(gates.shape[0] * top_k == total, message)
    _like(op, "gates", gates, lead_name, getattr(call, lead_name), or_float32=True)


def _finite(op: str, name: str, value: float) -> None:
    # Comparisons rather than math.isfinite: a symbolic float stays symbolic.
    require(
        value > float("-inf") and value < float("inf"),
        lambda: f"{op}: {name} must be finite, got {float(value):g}",
    )


def flatten_sort_count(call: FlattenSortCount) -> None:
    """expert_idxs [T, top_k] int32/int64, top_k ≥ 1, 1 ≤ num_experts ≤ 2²⁴."""
    op = "flatten_sort_count"
    expert_idxs, num_experts = call
    _dim(op, "expert_idxs", expert_idxs, 2, "T, top_k")
    require(
        expert_idxs.dtype in (torch.int32, torch.int64),
        lambda: f"{op}: expert_idxs must have dtype torch.int32 or torch.int64, got {expert_idxs.dtype}",
    )
    require(
        expert_idxs.shape[1] >= 1,
        lambda: f"{op}: expert_idxs must have at least 1 column, got shape {text(expert_idxs)}",
    )
    require(
        _countable(expert_idxs.numel()),
        lambda: f"{op}: expert_idxs must have at most {MOST_ROWS} elements, got {expert_idxs.numel()}",
    )
    require(num_experts >= 1, lambda: f"{op}: num_experts must be at least 1, got {num_experts}")
    require(
        num_experts <= MOST_EXPERTS,
        lambda: f"{op}: num_experts must be at most {MOST_EXPERTS}, got {num_experts}",
    )


def scatter_lora(call: ScatterLora) -> None:
    op = "scatter_lora"
    _routing(op, call, "x")
    _x(op, call)
    _float(op, "x", call.x)
    e, n, k = _weight(op, call, "x")
    _columns(op, "x", call.x, "K", k)
    _lora_pair(op, call, "x", (e, n, k))
    _finite(op, "scaling", call.scaling)
    _bias(op, call, "x", e, n)
    _gates(op, call, "x")


def scatter_lora_dx(call: ScatterLoraDx) -> None:
    op = "scatter_lora_dx"
    _routing(op, call, "dy")
    _dy(op, call)
    e, n, k = _weight(op, call, "dy")
    _columns(op, "dy", call.dy, "N", n)
    _lora_pair(op, call, "dy", (e, n, k))
    _finite(op, "scaling", call.scaling)
    _bias(op, call, "dy", e, n)
    _gates(op, call, "dy")
    if call.x is not None:
        _x(op, call)
        _like(op, "x", call.x, "dy", call.dy)
        _columns(op, "x", call.x, "K", k)


def _dy_and_x(op: str, call: NamedTuple) -> None:
    _routing(op, call, "dy")
    _dy(op, call)
    _x(op, call)
    _like(op, "x", call.x, "dy", call.dy)


def scatter_lora_dab(call: ScatterLoraDab) -> None:
    op = "scatter_lora_dab"
    _dy_and_x(op, call)
    _lora(op, call, "dy", (call.expert_offsets.shape[0], call.dy.shape[1], call.x.shape[1]))
    _finite(op, "scaling", call.scaling)
    _gates(op, call, "dy")


def scatter_lora_backward(call: ScatterLoraBackward) -> None:
    op = "scatter_lora_backward"
    _dy_and_x(op, call)
    e, n, k = _weight(op, call, "dy")
    _columns(op, "dy", call.dy, "N", n)
    _columns(op, "x", call.x, "K", k)
    _lora(op, call, "dy", (e, n, k))
    _finite(op, "scaling", call.scaling)
    _bias(op, call, "dy", e, n)
    _gates(op, call, "dy")


def scatter_lora_dw(call: ScatterLoraDw) -> None:
    op = "scatter_lora_dw"
    _dy_and_x(op, call)
    _gates(op, call, "dy")


def scatter_lora_dbias(call: ScatterLoraDbias) -> None:
    op = "scatter_lora_dbias"
    _routing(op, call, "dy")
    _dy(op, call)
    _gates(op, call, "dy")


def _glu(op: str, call: Glu | GluBackward) -> None:
    h, act, alpha, limit = call.h, call.act, call.alpha, call.limit
    _dim(op, "h", h, 2, "rows, 2I")
    _float(op, "h", h)
    require(
        h.shape[1] >= 2 and h.shape[1] % 2 == 0,
        lambda: f"{op}: h must have an even number of columns, at least 2, got shape {text(h)}",
    )
    require(act in ACTS, lambda: f"{op}: act must be silu, gelu or gelu_tanh, got {act}")
    _finite(op, "alpha", alpha)
    require(
        act == "silu" or alpha == 1.0,
        lambda: f"{op}: alpha must be 1 when act is {act}, got {float(alpha):g}",
    )
    require(
        limit is None or limit > 0,
        lambda: f"{op}: limit must be None or greater than 0, got {float(limit):g}",
    )
    _finite(op, "up_shift", call.up_shift)


def glu(call: Glu) -> None:
    """h [rows, 2I]."""
    _glu("glu", call)


def glu_backward(call: GluBackward) -> None:
    """dy [rows, I] beside the arguments of `glu`."""
    op = "glu_backward"
    _glu(op, call)
    rows, columns = call.h.shape
    _shape(op, "dy", call.dy, (rows, columns // 2), "the rows and half the columns of h")
    _like(op, "dy", call.dy, "h", call.h)
