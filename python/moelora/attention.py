"""Attention with sinks by torch's own fused kernel, under transformers' name `moelora_sinks`.

transformers computes such attention (gpt-oss's) step by step, a matrix of scores at a time: a third of a
training step of gpt-oss-20b on a CPU with AMX. A sink is a key that every query sees with the same logit, and
whose value is zero. So one more dimension, 1 in each query and the logit in that key alone, makes it plain
attention.

`model.set_attn_implementation(moelora.attention.NAME)` puts a model on it; importing this module makes the
name known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "moelora_sinks"
KNOWN = ("gpt_oss", "granitemoe_swa", "mimo_v2_flash")  # whose own attention it has been compared with


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
        query: [B, H, T, D]; key: [B, Hkv, S, D]; value: [B, Hkv, S, Dv] with Dv ≤ D.
        attention_mask: [B or 1, 1 or H, T, S], bool or what is added to scores; None for all keys up to each
            query's position.
        scaling: of scores; None: D ** -0.5.
        s_aux: logits of the sinks, [H]; None: none.
    """
    heads, queries, width = query.shape[1:]
    keys, own = key.shape[2], value.shape[3]
    scaling = width**-0.5 if scaling is None else scaling
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    if attention_mask is None:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    if s_aux is None:
        value = functional.pad(value, (0, width - own))
    else:
        query = torch.cat([query, query.new_ones(*query.shape[:3], 1)], -1)
        sink = functional.pad((s_aux / scaling).to(key.dtype).view(1, heads, 1, 1), (width, 0))
        key = torch.cat([functional.pad(key, (0, 1)), sink.expand(len(key), -1, -1, -1)], 2)
        value = functional.pad(value, (0, width + 1 - own, 0, 1))
        seen = attention_mask.dtype is torch.bool  # else it is added, and nothing to the sink
        attention_mask = functional.pad(attention_mask, (0, 1), value=seen)
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out[..., :own].transpose(1, 2).contiguous(), None


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' for SDPA, whatever it says: a query sees its sink beside the keys."""
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)


def use(model: PreTrainedModel) -> bool:
    """Puts a model with sinks, on the CPU or without storage, on it, unless it has another way than eager."""
    text = model.config.get_text_config()
    wanted = text.model_type in KNOWN and text._attn_implementation == "eager"
    if wanted and model.device.type in ("cpu", "meta"):
        model.set_attn_implementation(NAME)
        return True
    return False
