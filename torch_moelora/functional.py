"""The public functions. Shapes: T tokens, S = T·top_k routed rows, E experts, K → N features, R LoRA rank.

A *slot* is one (token, choice) pair, `t·top_k + j`. *Slot order* is that order; *grouped order* is sorted by
expert, stable within an expert, with the slots of sentinel ids (outside [0, E)) last.

All floating-point arguments have one dtype (bfloat16, float16, float32; float64 on CPU), except that beside a
half `x` the LoRA parameters, the bias and the gates may be float32. Accumulation is float32 (float64 for
float64), and each result is rounded once. Results are bit-identical whatever the number of threads, and with
`torch_moelora.set_batch_invariant(True)` those of a token whatever else is in the batch.

Under `torch.autocast`, x, weight and bias are cast to its dtype, float32 LoRA parameters and gates stay as
they are.
A weight of another dtype is then copied whole in every call: keep the frozen base in the autocast dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .activations import plain_activation
from .calls import ScatterLora
from .formats import PackedWeight
from .glu_scatter_lora import glu_scatter_lora


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sorts routed rows by expert.

    Args:
        expert_idxs: [T, top_k] int32 or int64, the experts of each token. An id outside [0, num_experts) is a
            sentinel: its row is computed nowhere and is zero in every result.
        num_experts: E, from 1 to 2²⁴.

    Returns:
        sorted_scattered_idxs: [T·top_k] int64, position in grouped order → slot. A permutation.
        expert_offsets: [E] int32, inclusive running count of rows per expert (the `offs` of
            `torch.nn.functional.grouped_mm`). Its last element is the number of rows that are not sentinels.

    Raises:
        RuntimeError: wrong number of dimensions, dtype or num_experts.
    """
    return torch.ops.moelora.flatten_sort_count(expert_idxs, num_experts)


def _operands(weight: Tensor | PackedWeight) -> dict:
    """The operators' arguments that are the weight."""
    return weight.operands() if isinstance(weight, PackedWeight) else {"weight": weight}


def scatter_lora(
    x: Tensor,
    weight: Tensor | PackedWeight,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    top_k: int,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
    x_grouped: bool = False,
    y_grouped: bool = False,
    sum_fp32: bool = False,
) -> Tensor:
    """Linear layer with LoRA, of each routed row's own expert: x·Wᵀ + scaling·(x·Aᵀ)·Bᵀ + bias.

    The formula is Hu et al. 2021 (LoRA), eq. 3, applied to expert e's slice of every parameter.
    Differentiable in x, weight, lora_a, lora_b, bias and gates; once only.

    Args:
        x: [T, K], or [S, K] in grouped order if `x_grouped`. Any strides.
        weight: [E, N, K], any strides, read in place. For a stored [E, K, N] pass `w.transpose(1, 2)`. Or a
            `formats.PackedWeight`, which is frozen and unpacked piece by piece; not with a float64 x.
        sorted_scattered_idxs, expert_offsets: [S] int64 and [E] int32, from `flatten_sort_count`.
        top_k: slots per token; S is a multiple of it.
        lora_a, lora_b: [E, R, K] and [E, N, R], any strides; both or neither. PEFT's parameters are the views
            `A.view(E, R, K)` and `B.view(N, R, E).permute(2, 0, 1)`.
        scaling: finite factor of the LoRA term.
        bias: [E, N].
        gates: [T, top_k] routing weights. With them the result is each token's weighted sum. Not with
            `y_grouped`.
        x_grouped: x holds one row per slot, in grouped order, instead of one per token.
        y_grouped: the result is in grouped order instead of slot order.
        sum_fp32: with gates, the sum of a half x comes back in float32, for sums that go on; and so does its
            gradient, if it takes one in float32 (a leaf whose `grad_dtype` says so).

    Returns:
        [T, N] with gates, else [S, N]; contiguous, x's dtype but for `sum_fp32`. Rows of sentinel slots are
        zero.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value; the message names it. On CPU this
            covers the contents of the index tensors.
    """
    return torch.ops.moelora.scatter_lora(
        x, sorted_scattered_idxs=sorted_scattered_idxs, expert_offsets=expert_offsets, top_k=top_k,
        lora_a=lora_a, lora_b=lora_b, scaling=scaling, bias=bias, gates=gates, x_grouped=x_grouped,
        y_grouped=y_grouped, sum_fp32=sum_fp32, **_operands(weight),
    )  # fmt: skip


def linear_lora(
    x: Tensor,
    weight: Tensor | PackedWeight,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Linear layer with LoRA, as one expert of `scatter_lora`: x·Wᵀ + scaling·(x·Aᵀ)·Bᵀ + bias.

    Args:
        x: [..., K].
        weight: [N, K], or a `formats.PackedWeight` of shape (1, N, K).
        lora_a, lora_b: [R, K] and [N, R]; both or neither.
        scaling: finite factor of the LoRA term.
        bias: [N].

    Returns:
        [..., N], x's dtype.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device; the message names it.
    """
    rows = x.reshape(-1, x.shape[-1])
    tokens = rows.shape[0]
    as_expert = {"lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    y = scatter_lora(
        rows,
        weight if isinstance(weight, PackedWeight) else weight.unsqueeze(0),
        torch.arange(tokens, device=x.device),
        torch.full((1,), tokens, dtype=torch.int32, device=x.device),
        1,
        scaling=scaling,
        x_grouped=True,  # the order of rows is the same, and nobody need ask
        y_grouped=True,
        **{name: t if t is None else t.unsqueeze(0) for name, t in as_expert.items()},
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def glu(
    h: Tensor,
    act: str = "silu",
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    """Gated activation f(g)·(u + up_shift), with g clamped to at most `limit` and u to ±`limit`.

    The formula is Shazeer 2020 (GLU variants); clamp, alpha and shift are those of gpt_oss, which is
    ("silu", 1.702, 7.0, 1.0, True). Differentiable in h; once only.

    Args:
        h: [rows, 2I]. g is its first half and u its second; its even and odd columns if `interleaved`.
        act: "silu" (g·σ(alpha·g)), "gelu" (exact) or "gelu_tanh".
        alpha: finite; 1 unless act is "silu".
        limit: greater than 0, or None for no clamp.
        up_shift: finite.
        interleaved: g and u alternate.

    Returns:
        [rows, I], h's dtype.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or value; the message names it.
    """
    return torch.ops.moelora.glu(h, act, alpha, limit, up_shift, interleaved)


def _routing(expert_idxs: Tensor, num_experts: int) -> dict:
    """The operators' arguments that say which row goes where."""
    slots, offsets = flatten_sort_count(expert_idxs, num_experts)
    return {"sorted_scattered_idxs": slots, "expert_offsets": offsets, "top_k": expert_idxs.shape[1]}


def _check_moe_mlp(x, expert_idxs, gates, gate_up_weight, down_weight, gated, activation) -> None:
    """What the operators below could only report in terms of their own argument names.

    Plain `if` and `raise`: torch.compile cannot trace torch._check with such messages.
    """
    for name, t, dim in (
        ("x", x, 2),
        ("expert_idxs", expert_idxs, 2),
        ("gates", gates, 2),
        ("gate_up_weight", gate_up_weight, 3),
        ("down_weight", down_weight, 3),
    ):
        t = t.codes if isinstance(t, PackedWeight) else t
        if t is not None and t.dim() != dim:
            raise RuntimeError(f"moe_mlp: {name} must be {dim}-D, got shape {list(t.shape)}")
    if expert_idxs.shape[0] != x.shape[0]:
        rows = f"{x.shape[0]} rows (those of x)"
        raise RuntimeError(f"moe_mlp: expert_idxs must have {rows}, got shape {list(expert_idxs.shape)}")
    if gates is not None and gates.shape != expert_idxs.shape:
        want = f"{list(expert_idxs.shape)} (that of expert_idxs)"
        raise RuntimeError(f"moe_mlp: gates must have shape {want}, got {list(gates.shape)}")
    experts, columns, features = gate_up_weight.shape
    if features != x.shape[1]:
        want = f"[E, N, {x.shape[1]}] (the columns of x)"
        raise RuntimeError(
            f"moe_mlp: gate_up_weight must have shape {want}, got {list(gate_up_weight.shape)}"
        )
    inner = columns // 2 if gated else columns
    if activation is not None:
        inner = down_weight.shape[2]
    if down_weight.shape[0] != experts or down_weight.shape[2] != inner:
        want = f"[{experts}, N, {inner}] (E and I of gate_up_weight, gated is {gated})"
        raise RuntimeError(f"moe_mlp: down_weight must have shape {want}, got {list(down_weight.shape)}")


def _check_ungated(gated, activation, act, alpha, limit, up_shift, interleaved) -> None:
    """Options of the gated unit mean nothing without it, and nothing is silently dropped."""
    if gated and activation is None:
        return
    if activation is not None and (act != "silu" or alpha != 1):
        came = f"act={act}, alpha={alpha}"
        raise RuntimeError(f"moe_mlp: act and alpha must be left out when activation is given, got {came}")
    unit = "activation is given" if activation is not None else "gated is False"
    if limit is not None:
        raise RuntimeError(f"moe_mlp: limit must be None when {unit}, got {limit}")
    if up_shift != 0:
        raise RuntimeError(f"moe_mlp: up_shift must be 0 when {unit}, got {up_shift}")
    if interleaved:
        raise RuntimeError(f"moe_mlp: interleaved must be False when {unit}, got True")


def moe_mlp(
    x: Tensor,
    expert_idxs: Tensor,
    gates: Tensor | None,
    gate_up_weight: Tensor | PackedWeight,
    down_weight: Tensor | PackedWeight,
    *,
    gate_up_lora_a: Tensor | None = None,
    gate_up_lora_b: Tensor | None = None,
    gate_up_scaling: float = 1.0,
    down_lora_a: Tensor | None = None,
    down_lora_b: Tensor | None = None,
    down_scaling: float = 1.0,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    act: str = "silu",
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    interleaved: bool = False,
    gated: bool = True,
    activation: Callable[[Tensor], Tensor] | None = None,
    sum_fp32: bool = False,
) -> Tensor:
    """The experts of a mixture-of-experts layer: route → gate_up → activation → down, weighted by `gates`.

    Kept for the backward: arguments, the indices and h = gate_up(x) [S, 2I]. The gated unit's output is
    recomputed from h. Differentiable in x, gates and every parameter; once only.

    Args:
        x, gates: [T, H], [T, top_k]; gates None for the rows of the single experts, without weights.
        expert_idxs: [T, top_k] int32 or int64; ids outside [0, E) are sentinels and contribute nothing.
        gate_up_weight, down_weight: [E, 2I, H] ([E, I, H] if not `gated`), [E, H, I]; as in `scatter_lora`.
        gate_up_lora_a, gate_up_lora_b: [E, R, H], [E, 2I, R]; both or neither.
        down_lora_a, down_lora_b: [E, R', I], [E, H, R']; both or neither.
        gate_up_scaling, down_scaling: factors of the LoRA terms. gate_up_bias, down_bias: [E, 2I], [E, H].
        act, alpha, limit, up_shift, interleaved: those of `glu`. sum_fp32: that of `scatter_lora`.
        gated: False: one plain `act`: "silu" (with alpha), "gelu", "gelu_tanh", "relu", "relu2" (its square).
        activation: replaces the activation: a function of h [S, 2I] in grouped order that gives [S, I].

    Returns:
        [T, H], x's dtype or `sum_fp32`'s; without gates [T·top_k, H] in slot order, zeros of sentinels.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or value; the message names it.
    """
    _check_moe_mlp(x, expert_idxs, gates, gate_up_weight, down_weight, gated, activation)
    _check_ungated(gated, activation, act, alpha, limit, up_shift, interleaved)
    routing = _routing(expert_idxs, gate_up_weight.shape[0])
    h = scatter_lora(
        x, gate_up_weight, **routing, lora_a=gate_up_lora_a, lora_b=gate_up_lora_b, scaling=gate_up_scaling,
        bias=gate_up_bias, y_grouped=True, sum_fp32=sum_fp32,
    )  # fmt: skip
    down = ScatterLora(
        h, **_operands(down_weight), **routing, lora_a=down_lora_a, lora_b=down_lora_b, scaling=down_scaling,
        bias=down_bias, gates=gates, x_grouped=True, sum_fp32=sum_fp32)  # fmt: skip
    if gated and activation is None:
        return glu_scatter_lora(down, (act, alpha, limit, up_shift, interleaved))
    inner = plain_activation(h, act, alpha) if activation is None else activation(h)
    return torch.ops.moelora.scatter_lora(*down._replace(x=inner))
