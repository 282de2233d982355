"""A layer's experts on several ranks: the placement that its binding has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moelora.experts import Compute
from moelora.placement import exchange
from moelora.placement.gradients import averaged
from moelora.placement.group import Group

_LORA = ("gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b")
_BIASES = ("gate_up_bias", "down_bias")


class Ranks:
    """Which rank has which of a layer's experts.

    where, number: the layer, and which of the model's it is. owners: the rank of each expert.
    own: those of this rank, in order; they are its local experts 0, 1, ….
    anchor: what DDP finds to train in a model of which nothing else is; its gradient is zero.
    """

    def __init__(self, group: Group, where: str, number: int, owners: list[int]) -> None:
        self.group, self.where, self.number, self.owners = group, where, number, owners
        self.own = [expert for expert, rank in enumerate(owners) if rank == group.rank]
        self.anchor: nn.Parameter | None = None
        numbers = [0] * group.size
        local = []
        for rank in owners:
            local.append(numbers[rank])
            numbers[rank] += 1
        # One more for ids that are no expert's.
        self._owners, self._local = torch.tensor([*owners, group.size]), torch.tensor([*local, -1])

    def __str__(self) -> str:
        return f"{len(self.own)} here, on rank {self.group.rank} of {self.group.size}"

    def sum(
        self, x: Tensor, ids: Tensor, gates: Tensor, parameters: dict[str, Any], compute: Compute
    ) -> Tensor:
        """The layer's sum for this rank's tokens; called on all ranks, with however many tokens each has."""
        return self._sum(x, ids, gates, parameters, compute)

    @torch.compiler.disable(reason="experts are spread over ranks, and their exchange is not traced")
    def _sum(
        self, x: Tensor, ids: Tensor, gates: Tensor, parameters: dict[str, Any], compute: Compute
    ) -> Tensor:
        autocast = x.device.type
        x = x.to(torch.get_autocast_dtype(autocast)) if torch.is_autocast_enabled(autocast) else x
        with self.group.telling(f"{self.where}, forward"):
            parameters = self._mine(parameters)
            learned = [parameters[name] for name in _LORA if parameters.get(name) is not None]
            needed = None
            if torch.is_grad_enabled() and any(t.requires_grad for t in learned):
                needed = self.anchor
                if needed is None or not needed.requires_grad:
                    needed = torch.empty(0, device=x.device, requires_grad=True)
        self.group.calls += needed is not None
        plan, sent = self._plan(ids)
        rows, their_gates, their_ids = exchange.Send.apply(x, gates, sent, plan)
        with self.group.telling(f"{self.where}, forward"):
            y = self._here(rows, their_ids, their_gates, parameters, compute, learned)
        y = exchange.Mark.apply(y, needed, plan.tokens)
        return exchange.Return.apply(y, plan, x.shape[0], x.dtype)

    def _mine(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """`moe_mlp`'s arguments for the experts of this rank."""
        own = {name: averaged(parameters[name], self.group.size) for name in _LORA if name in parameters}
        for name in _BIASES:
            if parameters[name] is not None:
                own[name] = parameters[name][self.own]
        return parameters | own | {"sum_fp32": True}

    def _plan(self, ids: Tensor) -> tuple[exchange.Plan, Tensor]:
        """The plan, and the ids that go with its rows: the receiver's own, -1 for those of others."""
        if self._owners.device != ids.device:
            self._owners, self._local = self._owners.to(ids.device), self._local.to(ids.device)
        ids = ids.where((ids >= 0) & (ids < len(self.owners)), len(self.owners)).long()
        owners = self._owners[ids]
        plan = exchange.plan(self.group, self.where, self.number, owners)
        sizes = torch.tensor(plan.sent, device=ids.device)
        goal = torch.arange(self.group.size, device=ids.device).repeat_interleave(sizes)
        local = self._local[ids].where(owners != self.group.size, -1)[plan.tokens]
        return plan, local.where(owners[plan.tokens] == goal.unsqueeze(1), -1).int()

    def _here(
        self,
        rows: Tensor,
        ids: Tensor,
        gates: Tensor,
        parameters: dict[str, Any],
        compute: Compute,
        learned: list,
    ) -> Tensor:
        """This rank's share of the sums, of the rows that came."""
        if self.own:
            return compute(rows, ids, gates, parameters)
        y = rows.float() if rows.dtype.itemsize == 2 else rows
        for factor in learned:  # of no experts: they get gradients of no elements, as the others get theirs
            y = y + factor.sum().to(y.dtype)
        return y
