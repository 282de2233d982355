"""Ways of assigning tokens to experts. A token's experts are distinct, as a router's top-k makes them."""

from __future__ import annotations

import torch
from torch import Tensor


def _balanced(tokens: int, experts: int, top_k: int, gen: torch.Generator) -> Tensor:
    """Every expert gets the same number of rows, give or take one."""
    slots = torch.arange(tokens * top_k).view(tokens, top_k) % experts
    return slots[torch.randperm(tokens, generator=gen)]


def _random(tokens: int, experts: int, top_k: int, gen: torch.Generator) -> Tensor:
    return torch.rand(tokens, experts, generator=gen).topk(top_k, dim=1).indices


def _zipf(tokens: int, experts: int, top_k: int, gen: torch.Generator) -> Tensor:
    """Drawn without replacement with probability ∝ 1/rank (Gumbel top-k)."""
    gumbel = -torch.log(-torch.log(torch.rand(tokens, experts, generator=gen).clamp_(1e-9, 1 - 1e-7)))
    log_p = -torch.log(torch.arange(1, experts + 1, dtype=torch.float32))
    return (gumbel + log_p).topk(top_k, dim=1).indices


def _hot(tokens: int, experts: int, top_k: int, gen: torch.Generator) -> Tensor:
    """One expert is among every token's; the others are random."""
    score = torch.rand(tokens, experts, generator=gen)
    score[:, 0] = 2
    return score.topk(top_k, dim=1).indices


ROUTINGS = {"balanced": _balanced, "random": _random, "zipf": _zipf, "hot": _hot}


def route(kind: str, tokens: int, experts: int, top_k: int, gen: torch.Generator) -> Tensor:
    """expert_idxs [tokens, top_k] int64. Which experts are the popular ones is random too."""
    label = torch.randperm(experts, generator=gen)
    return label[ROUTINGS[kind](tokens, experts, top_k, gen)]
