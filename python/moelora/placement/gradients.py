"""Gradients of what only one rank has: averaged as DDP averages the others', and counted once in norms."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad

from moelora.placement.group import Group

_OWN: weakref.WeakKeyDictionary[nn.Module, Group] = weakref.WeakKeyDictionary()  # by the factor's layer


class _Averaged(Function):
    @staticmethod
    def forward(ctx: Any, factor: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None


def averaged(factor: Tensor | None, ranks: int) -> Tensor | None:
    """The factor; its gradient, which has the tokens of all ranks, is divided by their number.

    That is what DDP leaves of gradients: each rank's loss counts as one of so many.
    """
    return factor if factor is None or not factor.requires_grad else _Averaged.apply(factor, ranks)


def own(layer: nn.Module, group: Group) -> None:
    """Let norms of gradients know that the layer's weight is this rank's alone."""
    _OWN[layer] = group
    if not hasattr(clip_grad._get_total_norm, "_moelora"):
        norm, clip = (
            _of_all_ranks(clip_grad._get_total_norm),
            _of_both_kinds(clip_grad._clip_grads_with_norm_),
        )
        clip_grad._get_total_norm = clip_grad.get_total_norm = nn.utils.get_total_norm = norm
        clip_grad._clip_grads_with_norm_ = clip_grad.clip_grads_with_norm_ = clip
        nn.utils.clip_grads_with_norm_ = clip


def _of_all_ranks(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's norm of gradients, which clipping goes by: those of experts on other ranks count, too."""

    @functools.wraps(plain)
    @torch.no_grad()
    def total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: Any = None
    ):
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        groups = {id(layer.weight.grad): group for layer, group in _OWN.items()}
        groups.pop(id(None), None)
        here = [(t, groups[id(t)]) for t in tensors if id(t) in groups]
        if not here:
            return plain(tensors, norm_type, error_if_nonfinite, foreach)
        rest = plain([t for t in tensors if id(t) not in groups], norm_type, False, foreach)
        norms = [rest.full_tensor() if isinstance(rest, DTensor) else rest]
        for group in dict.fromkeys(group for _, group in here):
            mine = [t for t, whose in here if whose is group and t.numel()]
            norm = plain(mine, norm_type, False, foreach).to(norms[0].device, torch.float32)
            ones = [1] * group.size
            told = norm.expand(group.size).contiguous()
            norms += group.exchange(told, ones, ones, "the norm of all gradients").unbind()
        # In one order on all ranks, so that all scale by the same bits.
        norms = [norm.to(norms[0].device, torch.float32) for norm in norms]
        found = torch.linalg.vector_norm(torch.stack(norms), float(norm_type))
        if error_if_nonfinite and not found.isfinite():
            raise RuntimeError(
                f"the total norm of order {norm_type} is {found.item()}, so nothing is clipped"
            )
        return found

    total_norm._moelora = True
    return total_norm


def _of_both_kinds(plain: Callable[..., None]) -> Callable[..., None]:
    """torch's scaling of gradients, also where FSDP2 shards some and leaves those of experts alone."""

    @functools.wraps(plain)
    def clip(parameters: Any, max_norm: float, total_norm: Tensor, foreach: bool | None = None) -> None:
        several = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        meshes: dict[Any, list[Tensor]] = {}
        for one in several:
            meshes.setdefault(getattr(one.grad, "device_mesh", None), []).append(one)
        if len(meshes) == 1 or isinstance(total_norm, DTensor):
            return plain(several, max_norm, total_norm, foreach)
        for mesh, alike in meshes.items():
            norm = total_norm if mesh is None else DTensor.from_local(total_norm, mesh)
            plain(alike, max_norm, norm, foreach)
        return None

    return clip
