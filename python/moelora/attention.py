"""Attention on CPUs, with sinks and without work for keys that nobody sees.

transformers computes attention with sinks (gpt-oss's) step by step, a matrix of scores at a time, and torch's
fused kernel for CPUs multiplies all queries with up to 512 keys, hidden ones too. Here queries are taken a
block at a time, each with the keys from the first to the last that any of them sees: by that kernel, or where
it multiplies bf16 no faster than float32, by products.

A sink is a key that every query sees with the same logit s, and whose value is zero. With the result o and
the log-sum-exp l of the other keys, attention is y = σ(l - s)·o, and its gradients are those of o for σ(l -
s)·dy in place of dy, where the kernel takes y for its result: what it makes of that is Σ dy·y, the share of
the softmax.

`model.set_attn_implementation(moelora.attention.NAME)` puts a model on it; importing this module makes the
name known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from torch_moelora import info
from torch_moelora.functional import scatter_lora

NAME = "moelora"
KNOWN = ("gpt_oss", "granitemoe_swa", "mimo_v2_flash")  # with sinks, compared with transformers' own
BLOCK = 256  # queries; of fewer than 192 the kernel takes 32 at a time
# Products, for ordinary attention in bf16:
PLAIN = ("deepseek_v2", "deepseek_v3", "granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
ROWS, LEAST_ROWS = 64, 16  # queries of all heads whose scores are made at once, fewer if these would be more
SCORES = 1 << 22  #   than so many
MOST_KEYS = 16  # for each column of a query: of 64 columns 1024 take 7 % longer, of 128 4096 still less
NOT_HERE = ("position_bias", "softcap", "indices", "block_indices")  # what some attention is told as well

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _has_values(mask: Tensor) -> bool:
    """Whether it is one of bools that can be looked at."""
    abstract = isinstance(mask, FakeTensor) or mask.is_meta or torch.compiler.is_compiling()
    return mask.dtype is torch.bool and not abstract


def _blocks(mask: Tensor | None, queries: int, keys: int, size: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that it sees some of. Where that cannot be asked, with all."""
    blocks = [slice(start, min(start + size, queries)) for start in range(0, queries, size)]
    if mask is None:
        return [(block, slice(0, max(1, keys - queries + block.stop))) for block in blocks]
    if not _has_values(mask):
        return [(block, slice(0, keys)) for block in blocks]
    found = []
    for block in blocks:
        seen = mask[..., block, :].flatten(0, -2).any(0).nonzero().flatten().tolist()
        found.append((block, slice(seen[0], seen[-1] + 1) if seen else slice(0, keys)))
    return found


def _part(mask: Tensor | None, rows: slice, cols: slice, apart: int, device: torch.device) -> Tensor:
    """What some queries see of some keys, [B or 1, 1 or H, T, S]: a part of `mask`, or without one the
    keys up to their own, which is `apart` places behind.
    """
    if mask is not None:
        return mask[..., rows, cols]
    shape = (rows.stop - rows.start, cols.stop - cols.start)
    seen = torch.ones(shape, dtype=torch.bool, device=device).tril(rows.start - cols.start + apart)
    return seen[None, None]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores. Never -∞, so that a query without a key has a finite result."""
    least = torch.finfo(dtype).min
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, least)
    return mask.clamp(min=least).to(dtype)


class _Attention(torch.autograd.Function):
    """(y [B, H, T, D], log-sum-exp of the keys' scores [B, H, T]); the second has no gradient."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        batch, heads, queries, width = query.shape
        y = query.new_empty(batch, queries, heads, width).transpose(1, 2)
        sums = torch.empty(batch, heads, queries, dtype=_sums_of(query.dtype), device=query.device)
        keys, least = key.shape[2], torch.finfo(query.dtype).min
        for rows, cols in _blocks(mask, queries, keys, BLOCK):
            part = _part(mask, rows, cols, keys - queries, query.device)
            out, sums[:, :, rows] = _forward(
                query[:, :, rows],
                key[:, :, cols],
                value[:, :, cols],
                attn_mask=_added(part, query.dtype),
                scale=scale,
            )
            y[:, :, rows] = out * _shares(sums[:, :, rows], sinks, least)
        return y, sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        query, key, value, sinks, mask, ctx.scale = inputs
        y, sums = output
        ctx.mark_non_differentiable(sums)
        ctx.save_for_backward(query, key, value, sinks, mask, y, sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, mask, y, sums = ctx.saved_tensors
        queries, keys = query.shape[2], key.shape[2]
        shares = _shares(sums, sinks, torch.finfo(query.dtype).min)
        d_out = (dy * shares).to(dy.dtype)
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(t, dtype=sums.dtype) for t in (key, value))
        for rows, cols in _blocks(mask, queries, keys, BLOCK):
            part = _part(mask, rows, cols, keys - queries, query.device)
            d_query[:, :, rows], of_key, of_value = _backward(
                d_out[:, :, rows], query[:, :, rows], key[:, :, cols], value[:, :, cols], y[:, :, rows],
                sums[:, :, rows], 0.0, False, attn_mask=_added(part, query.dtype), scale=ctx.scale,
            )  # fmt: skip
            d_key[:, :, cols] += of_key
            d_value[:, :, cols] += of_value
        d_sinks = None
        if ctx.needs_input_grad[3]:
            taken = (dy.to(sums.dtype) * y).sum(-1, keepdim=True) * (shares - 1)
            d_sinks = taken.sum((0, 2, 3)).to(sinks.dtype)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_sinks, None, None


def _sums_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _shares(sums: Tensor, sinks: Tensor | None, least: float) -> Tensor:
    """What the keys have of the softmax beside the sink, without one all or, where there is no key, nothing:
    [B, H, T, 1].
    """
    if sinks is None:
        return (sums > least / 2)[..., None]
    return torch.sigmoid(sums - sinks.to(sums.dtype).view(1, -1, 1))[..., None]


def _products(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a · bᵀ for each key head of each sequence: [E, R, D] and [E, M, D] → [E, R, M], in float32."""
    heads, rows, width = a.shape
    places = torch.arange(heads * rows, device=a.device)
    ends = torch.arange(rows, heads * rows + 1, rows, dtype=torch.int32, device=a.device)
    scales = torch.full((heads * rows, 1), scale, device=a.device)
    a = a.reshape(-1, width)
    with torch.autocast("cpu", enabled=False):  # a backward may run under another than its forward
        found = scatter_lora(a, b, places, ends, 1, gates=scales, x_grouped=True, sum_fp32=True)
    return found.view(heads, rows, -1)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """In b's dtype, whatever autocast says."""
    with torch.autocast("cpu", enabled=False):
        return torch.bmm(a.to(b.dtype), b)


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Over the keys that are seen; of a query without one, zeros. Changes `scores`, [B, H, T, M]."""
    if mask.dtype is torch.bool:
        _hide(scores, mask)
        seen = mask.any(-1, keepdim=True)
    else:
        least = max(torch.finfo(t.dtype).min for t in (mask, scores))
        scores += mask.clamp(min=least)
        seen = (mask > least / 2).any(-1, keepdim=True)
    found = torch.softmax(scores, -1)
    return found if _has_values(seen) and seen.all() else found.mul_(seen)


def _hide(scores: Tensor, mask: Tensor) -> None:
    """Where `mask` is false. Columns of keys that all queries see, as most are, are not touched."""
    some = slice(None)
    if _has_values(mask):
        columns = (~mask).flatten(0, -2).any(0).nonzero().flatten().tolist()
        some = slice(columns[0], columns[-1] + 1) if columns else slice(0, 0)
    scores[..., some].masked_fill_(~mask[..., some], torch.finfo(scores.dtype).min)


class _ByProducts(torch.autograd.Function):
    """y [B, H, T, Dv]. Scores and their gradients are products of the operators, in float32, with key heads
    for experts; the others are torch's.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        batch, heads, queries, _ = query.shape
        y = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
        key, value = (t.flatten(0, 1) for t in (key, value))
        keys = key.shape[1]
        # The largest first: malloc then has room for the others.
        for rows, cols in reversed(_blocks(mask, queries, keys, _rows_at_once(query, key))):
            part = _part(mask, rows, cols, keys - queries, query.device)
            shares, _ = _shares_of_keys(query[:, :, rows], key[:, cols], part, scale)
            out = _bmm(shares, value[:, cols])
            y[:, :, rows] = out.view(batch, heads, -1, out.shape[2])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        query, *both, mask = ctx.saved_tensors
        key, value = (t.flatten(0, 1) for t in both)
        queries, keys = query.shape[2], key.shape[1]
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(t, dtype=torch.float32) for t in (key, value))
        for rows, cols in reversed(_blocks(mask, queries, keys, _rows_at_once(query, key))):
            part = _part(mask, rows, cols, keys - queries, query.device)
            shares, q = _shares_of_keys(query[:, :, rows], key[:, cols], part, ctx.scale)
            of_y = dy[:, :, rows].reshape(*q.shape[:2], -1)
            d_value[:, cols] += _bmm(shares.transpose(1, 2), of_y)
            of_shares = _products(of_y, value[:, cols], ctx.scale)
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype).to(dy.dtype)
            d_query[:, :, rows] = _bmm(of_scores, key[:, cols]).view(d_query[:, :, rows].shape)
            d_key[:, cols] += _bmm(of_scores.transpose(1, 2), q)
        found = (t.to(dy.dtype).view(like.shape) for t, like in zip((d_key, d_value), both, strict=True))
        return d_query, *found, None, None


def _shares_of_keys(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Of the softmax: [E, R, M], with the queries [E, R, D] as they are beside the keys [E, M, D]."""
    q = query.reshape(len(key), -1, query.shape[3])
    scores = _products(q, key, scale)
    found = _softmax(scores.view(*query.shape[:3], -1), mask)
    return found.view(scores.shape), q


def _rows_at_once(query: Tensor, key: Tensor) -> int:
    """Queries whose scores are made together."""
    fit = SCORES // max(1, query.shape[:2].numel() * key.shape[1])
    return max(LEAST_ROWS, min(ROWS, fit))


def _lacks_products() -> bool:
    """Whether torch's kernel multiplies bf16 as float32: MKL has products of bf16 for Intel's processors, and
    those with AVX-512-BF16 and no AMX are nearly all AMD's.
    """
    cpu = info()["cpu"]
    return cpu["chosen"]["bf16"] == "avx512_bf16" and "amx_bf16" not in cpu["detected"]


BY_PRODUCTS = _lacks_products()


def _by_products(query: Tensor, key: Tensor, sinks: Tensor | None) -> bool:
    """Whether products are faster than torch's kernel: not for few queries, nor where what is made of scores
    takes as long as they do.
    """
    if not BY_PRODUCTS or sinks is not None or query.dtype is not torch.bfloat16:
        return False
    many = query.shape[2] >= LEAST_ROWS and query.numel() > 0
    return many and key.shape[2] <= MOST_KEYS * query.shape[3]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: [B, T, H, Dv], and no scores.

    Args:
        query: [B, H, T, D]; key: [B, Hkv, S, D]; value: [B, Hkv, S, Dv].
        attention_mask: [B or 1, 1 or H, T, S], bool or what is added to scores; None for all keys up to each
            query's position, or for all where `module` is not causal.
        scaling: of scores; None: D ** -0.5.
        s_aux: logits of the sinks, [H]; None: none.
    """
    queries, width = query.shape[2:]
    keys, own = key.shape[2], value.shape[3]
    _check(query, key, kwargs)
    if query.device.type not in ("cpu", "meta") and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scaling = width**-0.5 if scaling is None else scaling
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) in (None, True)
    if attention_mask is None and not causal:
        attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    if attention_mask is not None:
        if attention_mask.dim() != 4:
            found = list(attention_mask.shape)
            raise ValueError(
                f"{NAME}: attention_mask must be a 4-D tensor [B or 1, 1 or H, T, S], got shape {found}"
            )
        attention_mask = attention_mask.expand(-1, -1, queries, keys)
    query, key, value = _as_torch_casts(query, key, value)
    if not query.dtype == key.dtype == value.dtype:
        found = f"{query.dtype}, {key.dtype} and {value.dtype}"
        raise ValueError(f"{NAME}: query, key and value must have one dtype, got {found}")
    learned = attention_mask is not None and attention_mask.requires_grad
    here = query.device.type in ("cpu", "meta") and dropout == 0 and not learned
    if here and _by_products(query, key, s_aux):
        y = _ByProducts.apply(query, key, value, attention_mask, scaling)
        return y.transpose(1, 2).contiguous(), None
    wide = max(own, width)  # of all three, for torch's kernel
    query, key, value = (functional.pad(t, (0, wide - t.shape[3])) for t in (query, key, value))
    if here:
        # The kernel reads neighbours, whatever the last stride.
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        y, _ = _Attention.apply(query, key, value, s_aux, attention_mask, scaling)
    else:
        every = _part(attention_mask, slice(0, queries), slice(0, keys), keys - queries, query.device)
        y = _with_another_key(query, key, value, s_aux, every, scaling, dropout)
    return y[..., :own].transpose(1, 2).contiguous(), None


def _check(query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
    if key.shape[2] == 0:
        raise ValueError(f"{NAME}: key must have S of at least 1, got shape {list(key.shape)}")
    if query.shape[0] != key.shape[0]:
        found = f"{query.shape[0]} and {key.shape[0]}"
        raise ValueError(f"{NAME}: query and key must have the same B, got {found}")
    if told := [name for name in NOT_HERE if options.get(name) is not None]:
        raise ValueError(f"{NAME}: does not know {', '.join(told)}; use another attn_implementation")


def _as_torch_casts(*tensors: Tensor) -> list[Tensor]:
    """To autocast's dtype, where it is on: all but float64."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t.dtype is torch.float64 else t.to(dtype) for t in tensors]


def _with_another_key(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    mask: Tensor,
    scaling: float,
    dropout: float,
) -> Tensor:
    """By whatever kernel torch has for it. The sink is a key: one more dimension, 1 in each query and the
    logit in that key alone, makes it plain attention.
    """
    heads, width = query.shape[1], query.shape[3]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    if sinks is not None:
        query = torch.cat([query, query.new_ones(*query.shape[:3], 1)], -1)
        sink = functional.pad((sinks / scaling).to(key.dtype).view(1, heads, 1, 1), (width, 0))
        key = torch.cat([functional.pad(key, (0, 1)), sink.expand(len(key), -1, -1, -1)], 2)
        value = functional.pad(value, (0, 1, 0, 1))
        seen = mask.dtype is torch.bool  # else it is added, and nothing to the sink
        mask = functional.pad(mask, (0, 1), value=seen)
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return out[..., :width]


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: PreTrainedModel) -> bool:
    """Puts a model on the CPU or without storage on it: a KNOWN one, and a PLAIN one in bf16 where products
    are faster than torch's kernel. Not where another way than transformers' own choice was asked for.
    """
    text = model.config.get_text_config()
    kind, own = text.model_type, text._attn_implementation
    sinks = kind in KNOWN and own == "eager"
    slow = BY_PRODUCTS and kind in PLAIN and own == "sdpa" and model.dtype is torch.bfloat16
    if (sinks or slow) and model.device.type in ("cpu", "meta"):
        model.set_attn_implementation(NAME)
        return True
    return False
