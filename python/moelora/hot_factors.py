"""LoRA factors of which some experts' part is a parameter of its own on an accelerator, beside these experts.

To PEFT a factor stays one: its layer's `weight` is the whole factor, by a parametrization that puts the part
in its place, and so is its entry in a state dict. It is computed at each access, so that writing into it (as
PEFT's `hotswap_adapter` does) changes nothing; assigning to it, and loading a state dict, does. The place of
these experts in the parameter in host memory is not in use. Who computes with the operators takes both
parameters as they are (`stored`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

PART = "parametrizations.weight.0.part"
ORIGINAL = "parametrizations.weight.original"


class HotFactors(NamedTuple):
    """One projection's factors of some experts, on their device."""

    ids: tuple[int, ...]  # of H experts
    a: Tensor  # [H, R, K]
    b: Tensor  # [H, N, R]


class HotPart(nn.Module):
    """`part`: those experts' part of a factor as PEFT keeps it, A [E·R, K] (dim 0) or B [N, R·E] (dim 1)."""

    def __init__(self, factor: nn.Parameter, dim: int, rank: int, ids: Sequence[int], device: Any) -> None:
        super().__init__()
        self.dim, self.rank, self.ids = dim, rank, tuple(ids)
        self._versions, self._alone = (0, 0), 0
        part = of_experts(factor.detach(), dim, rank, self.ids).to(device)
        self.part = nn.Parameter(part, requires_grad=factor.requires_grad)
        if factor.grad is not None:  # of a step that is not complete
            self.part.grad = of_experts(factor.grad, dim, rank, self.ids).to(device)
            by_expert(factor.grad, dim, rank)[list(self.ids)] = 0

    def forward(self, factor: Tensor) -> Tensor:
        whole, part = (by_expert(t, self.dim, self.rank) for t in (factor, self.part))
        whole = joined(whole, self.ids, part)
        return whole.flatten(0, 1) if self.dim == 0 else whole.permute(1, 2, 0).flatten(1)

    def left_behind(self, factor: Tensor) -> bool:
        """Whether `factor` has changed twice since the first time, as by an optimizer, and `part` not."""
        if factor.is_inference() or not (factor.requires_grad and self.part.requires_grad):
            return False
        before, self._versions = self._versions, (factor._version, self.part._version)
        changed = [now > then for now, then in zip(self._versions, before, strict=True)]
        self._alone = self._alone + changed[0] if not changed[1] else 0
        return self._alone > 2  # the first is what was before

    def right_inverse(self, factor: Tensor) -> Tensor:
        """For whoever assigns to the layer's weight."""
        self.part.copy_(of_experts(factor, self.dim, self.rank, self.ids))
        return factor


Stored = tuple[Tensor, HotPart | None]  # a factor: what is in host memory, and its part elsewhere


def by_expert(factor: Tensor, dim: int, rank: int) -> Tensor:
    """A view of A [E·R, K] (dim 0) as [E, R, K], of B [N, R·E] (dim 1), the expert fastest, as [E, N, R]."""
    experts = factor.shape[dim] // rank
    if dim == 0:
        return factor.unflatten(0, (experts, rank))
    return factor.unflatten(1, (rank, experts)).permute(2, 0, 1)


def of_experts(factor: Tensor, dim: int, rank: int, chosen: Sequence[int]) -> Tensor:
    """A copy of the part of some experts, in the same layout."""
    found = by_expert(factor, dim, rank)[list(chosen)]
    return found.flatten(0, 1) if dim == 0 else found.permute(1, 2, 0).flatten(1)


def split(a: nn.Module, b: nn.Module, rank: int, ids: Sequence[int], device: torch.device) -> None:
    """Gives the factors of layers `a` and `b` parts on `device`, for experts `ids` and no others.

    Both stay in one piece if one of them is parametrized by somebody else, has no values yet, or is no matrix
    (between calls FSDP1 has them flat).
    """
    parts = _part(a), _part(b)
    if all(part and (part.ids, part.part.device) == (tuple(ids), device) for part in parts):
        return
    join(a)
    join(b)
    if not ids or not all(_plain(layer) for layer in (a, b)):
        return
    for layer, dim in ((a, 0), (b, 1)):
        with torch.inference_mode(False), torch.no_grad():  # they are trained later
            part = HotPart(layer.weight, dim, rank, ids, device)
            parametrize.register_parametrization(layer, "weight", part, unsafe=True)
        if not hasattr(layer, "_moelora_one_factor"):
            layer._moelora_one_factor = True
            layer.register_state_dict_post_hook(_save_one)
            layer.register_load_state_dict_pre_hook(_load_one)


def _plain(layer: nn.Module) -> bool:
    return (
        not parametrize.is_parametrized(layer, "weight")
        and isinstance(layer.weight, nn.Parameter)
        and layer.weight.ndim == 2
        and not layer.weight.is_meta
    )


def join(layer: nn.Module) -> None:
    """Makes the layer's weight one parameter again, the one that it was."""
    part = _part(layer)
    if part is None:
        return
    parametrize.remove_parametrizations(layer, "weight")
    if part.part.grad is not None and layer.weight.grad is not None:
        rows = by_expert(layer.weight.grad, part.dim, part.rank)
        rows[list(part.ids)] = by_expert(part.part.grad, part.dim, part.rank).to(rows.device)


def stored(a: nn.Module, b: nn.Module) -> tuple[Stored, Stored]:
    """Both factors as they are stored: what is in host memory, and the parts elsewhere, if there are any."""
    parts = _part(a), _part(b)
    if None in parts:  # of one, too, if somebody has parametrized the other since
        return (a.weight, None), (b.weight, None)  # once: a parametrization computes it at each access
    return (a.parametrizations.weight.original, parts[0]), (b.parametrizations.weight.original, parts[1])


def joined(factor: Tensor, ids: Sequence[int], part: Tensor) -> Tensor:
    """[E, ...] with the part [H, ...] of experts `ids` in its place."""
    return factor.index_copy(0, torch.tensor(ids, device=factor.device), part.to(factor.device))


def _part(layer: nn.Module) -> HotPart | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    several = layer.parametrizations.weight
    return several[0] if len(several) == 1 and isinstance(several[0], HotPart) else None


def _save_one(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict has the whole factor, under the name that it has everywhere."""
    if _part(layer) is not None:
        del state[prefix + ORIGINAL], state[prefix + PART]
        with torch.no_grad():
            state[prefix + "weight"] = layer.weight


def _load_one(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: the whole factor is told apart."""
    part = _part(layer)
    if part is not None and prefix + "weight" in state:
        whole = state.pop(prefix + "weight")
        state[prefix + ORIGINAL] = whole
        if whole.shape == layer.parametrizations.weight.original.shape:  # else torch names both shapes
            own = of_experts(whole, part.dim, part.rank, part.ids)
            state[prefix + PART] = own.to(part.part.device)  # it may be put in the part's place
