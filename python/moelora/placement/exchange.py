"""Tokens to the ranks that have their experts, and results back; in the backward the same way round.

A token goes once to each rank that has one of its experts, with all its ids and gates. Partial sums come back
in float32 (float64 for float64), are added in the order of ranks, and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from moelora.errors import MoeloraError
from moelora.placement.group import Group

ALIGNED = 8  # bytes: where a part of a message begins, for views of any dtype


@dataclass(frozen=True)
class Plan:
    """Which rows go where, in one forward of one layer.

    tokens: int64, the token of each row that is sent, rank by rank. sent, received: rows for and from each.
    """

    group: Group
    where: str
    tokens: Tensor
    sent: list[int]
    received: list[int]

    def there(self, rows: Tensor, way: str) -> Tensor:
        return self.group.exchange(rows, self.sent, self.received, f"{self.where}, {way}")

    def back(self, rows: Tensor, way: str) -> Tensor:
        return self.group.exchange(rows, self.received, self.sent, f"{self.where}, {way}")

    def added(self, rows: Tensor, count: int) -> Tensor:
        """What came back, summed for each of `count` tokens, in the order of ranks."""
        out = rows.new_zeros(count, rows.shape[1])
        end = 0
        for many in self.sent:  # a token is among a rank's rows at most once, so each sum has one order
            start, end = end, end + many
            out.index_add_(0, self.tokens[start:end], rows[start:end])
        return out


def plan(group: Group, where: str, number: int, owners: Tensor) -> Plan:
    """Tells every rank how many rows it gets.

    where, number: the layer, whose number is sent along. owners: int64 [T, top_k], `group.size` for no rank.
    """
    goes = torch.zeros(owners.shape[0], group.size + 1, dtype=torch.bool, device=owners.device)
    goes = goes.scatter_(1, owners, True)[:, : group.size]
    _, tokens = goes.t().nonzero(as_tuple=True)
    counts = goes.sum(0)
    told = torch.stack((counts, torch.full_like(counts, number)), 1)
    ones = [1] * group.size
    heard = group.exchange(told, ones, ones, f"{where}, forward").tolist()
    with group.telling(f"{where}, forward"):
        for rank, (_, other) in enumerate(heard):
            if other != number:
                raise MoeloraError(
                    f"{where}: rank {rank} is in the model's expert layer {other}, rank {group.rank} in "
                    f"{number}: all ranks must call the same layers in the same order"
                )
    return Plan(group, where, tokens, counts.tolist(), [count for count, _ in heard])


def packed(parts: list[Tensor]) -> Tensor:
    """2-D tensors of equally many rows as one message, uint8 [rows, bytes]."""
    sizes = _sizes([(part.shape[1], part.dtype) for part in parts])
    message = torch.empty(parts[0].shape[0], sum(sizes), dtype=torch.uint8, device=parts[0].device)
    kinds = [(part.shape[1], part.dtype) for part in parts]
    for part, view in zip(parts, unpacked(message, kinds), strict=True):
        view.copy_(part)
    return message


def unpacked(message: Tensor, kinds: list[tuple[int, torch.dtype]]) -> list[Tensor]:
    """The parts of a message, as views. kinds: columns and dtype of each."""
    found, start = [], 0
    for (columns, dtype), size in zip(kinds, _sizes(kinds), strict=True):
        found.append(message[:, start : start + columns * dtype.itemsize].view(dtype))
        start += size
    return found


def _sizes(kinds: list[tuple[int, torch.dtype]]) -> list[int]:
    return [-(-columns * dtype.itemsize // ALIGNED) * ALIGNED for columns, dtype in kinds]


class Send(Function):
    """x [T, H], gates [T, k], ids [S, k] of the rows as they are sent → the rows that came, and theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, ids: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        ctx.plan, ctx.count = plan, x.shape[0]
        kinds = [(t.shape[1], t.dtype) for t in (x, gates, ids)]
        message = packed([x[plan.tokens], gates[plan.tokens], ids])
        rows, their_gates, their_ids = unpacked(plan.there(message, "forward"), kinds)
        their_ids = their_ids.contiguous()
        ctx.mark_non_differentiable(their_ids)
        return rows, their_gates.contiguous(), their_ids

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dgates: Tensor, _: Any) -> tuple:
        plan, kinds = ctx.plan, [(t.shape[1], t.dtype) for t in (dx, dgates)]
        dx, dgates = unpacked(plan.back(packed([dx, dgates]), "backward"), kinds)
        wide = dx.float() if dx.dtype.itemsize == 2 else dx
        return plan.added(wide, ctx.count).to(dx.dtype), plan.added(dgates, ctx.count), None, None


class Mark(Function):
    """Saves something on every rank before the way back, and asks for it.

    torch's checkpoint recomputes when the first of what was saved is asked for, and stops when it has all.
    With this both are at the same place on all ranks, however little one without experts has computed.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, needed: Tensor | None, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.needed = None if needed is None else needed.shape
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        _ = ctx.saved_tensors
        return dy, dy.new_zeros(ctx.needed) if ctx.needs_input_grad[1] else None, None


class Return(Function):
    """Partial sums of the rows that came, y [·, H] → the tokens' own sums [T, H], in `dtype`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: Plan, count: int, dtype: torch.dtype) -> Tensor:
        ctx.plan, ctx.dtype = plan, y.dtype
        return plan.added(plan.back(y, "forward"), count).to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        rows = ctx.plan.there(dy[ctx.plan.tokens], "backward")
        return rows.to(ctx.dtype), None, None, None
