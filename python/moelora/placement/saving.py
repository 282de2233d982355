"""Adapters of a placed model: one file of all ranks' factors, and this rank's part of a file."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import MoeloraError
from moelora.hot_factors import of_experts
from moelora.placement.ranks import Ranks


@dataclass(frozen=True)
class Part:
    """A rank's part of a factor as PEFT keeps it: A [E·R, K] (dim 0), or B [N, R·E] with the expert fastest.

    rank: of LoRA.
    """

    ranks: Ranks
    rank: int
    dim: int

    def own(self, factor: Tensor) -> Tensor:
        return of_experts(factor, self.dim, self.rank, self.ranks.own)

    def is_whole(self, shape: torch.Size) -> bool:
        return shape[self.dim] == self.rank * len(self.ranks.owners)

    def whole(self, factor: Tensor) -> Tensor | None:
        """All ranks' parts together on the group's rank 0, None elsewhere. Called on all ranks."""
        group, owners = self.ranks.group, self.ranks.owners
        numbers = [owners.count(rank) for rank in range(group.size)]
        here = group.rank == 0
        rows = factor if self.dim == 0 else factor.t()
        width = rows.shape[1]
        rows = rows.detach().reshape(self.rank, -1, width).transpose(0, 1) if self.dim else rows.detach()
        rows = rows.reshape(-1, self.rank * width)  # one for an expert
        sent = [rows.shape[0] if rank == 0 else 0 for rank in range(group.size)]
        came = group.exchange(rows, sent, numbers if here else [0] * group.size, "saving adapters")
        if not here:
            return None
        order = sorted(range(len(owners)), key=lambda expert: owners[expert])  # as they came; stable
        found = torch.empty_like(came)
        found[order] = came
        found = found.view(len(owners), self.rank, width)
        if self.dim == 0:
            return found.flatten(0, 1)
        return found.permute(2, 1, 0).flatten(1).contiguous()


def take_own(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: of a whole factor, this rank's part."""
    key = prefix + "weight"
    if key in state and layer._moelora_part.is_whole(state[key].shape):
        state[key] = layer._moelora_part.own(state[key])
    layer._moelora_part.ranks.group.calls += 1  # what was gathered before is old


def gather(model: nn.Module) -> dict[str, Tensor]:
    """Every placed factor of a model, whole, by its name; on the group's rank 0. Called on all ranks."""
    found = {}
    for where, layer in model.named_modules():
        if hasattr(layer, "_moelora_part"):
            whole = layer._moelora_part.whole(layer.weight)
            if whole is not None:
                found[f"{where}.weight"] = whole
    return found


def gathers(kind: type) -> None:
    """Let `save_pretrained` of PEFT's models write what all ranks have, if the model is placed."""
    if not hasattr(kind.save_pretrained, "_moelora"):
        kind.save_pretrained = _of_all_ranks(kind.save_pretrained)


def _of_all_ranks(plain: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(plain)
    def save_pretrained(self: nn.Module, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        parts = [m._moelora_part for m in self.modules() if hasattr(m, "_moelora_part")]
        if not parts:
            return plain(self, save_directory, *args, **kwargs)
        group = parts[0].ranks.group
        kept = vars(self).get("_moelora_gathered")
        if kept is None or kept[0] != group.calls:  # else a callback has done it on all ranks
            group.all_here("save_pretrained")
            kept = (-1, gather(self))
        if group.rank == 0:
            given = kwargs.pop("state_dict", None)
            plain(
                self, save_directory, *args, **kwargs, state_dict={**(given or self.state_dict()), **kept[1]}
            )
        if kept[0] == -1:
            group.all_here("save_pretrained", math.inf)  # the file is there when any of them goes on
        return None

    save_pretrained._moelora = True
    return save_pretrained


class Keeping:
    """For a trainer that saves on one rank only: all ranks' factors and optimizer state, in advance.

    A callback calls `gather` on all ranks when a save is due. Until the next forward that trains,
    `save_pretrained` and the optimizer's `state_dict` then need no other rank.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, states: bool = True) -> None:
        self._model = model
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self._states: dict[int, dict[str, Tensor]] = {}
        parts = {
            layer.weight: layer._moelora_part for layer in model.modules() if hasattr(layer, "_moelora_part")
        }
        self._group = next(iter(parts.values())).ranks.group
        groups = self._optimizer.param_groups
        # As state dicts number parameters.
        numbered = enumerate(p for group in groups for p in group["params"])
        self._placed = [(number, p, parts[p]) for number, p in numbered if p in parts and states]
        for _, parameter, part in self._placed:  # loaded from a file, which has them whole
            state = self._optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim == 2 and part.is_whole(value.shape):
                    state[name] = part.own(value).contiguous()
        self._optimizer.register_state_dict_post_hook(self._whole)

    def gather(self) -> None:
        """Called on all ranks."""
        vars(self._model)["_moelora_gathered"] = (self._group.calls, gather(self._model))
        self._states = {}
        for number, parameter, part in self._placed:
            state = self._optimizer.state.get(parameter, {})
            # A rank without experts has their state nonetheless: gradients of no elements reach it.
            same = {
                name: v for name, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape
            }
            blocks = [n for n, v in state.items() if n not in same and isinstance(v, Tensor) and v.ndim]
            if blocks:
                raise MoeloraError(
                    f"{type(self._optimizer).__name__} keeps {blocks[0]} in blocks, which ranks cannot put "
                    "together: take an optimizer with a state for each element, or save_only_model=True"
                )
            self._states[number] = {name: part.whole(same[name]) for name in sorted(same)}
        self._calls = self._group.calls

    def _whole(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if self._states and self._calls == self._group.calls and self._group.rank == 0:
            for number, whole in self._states.items():
                state["state"][number] = {**state["state"].get(number, {}), **whole}
