"""`place`: which of a model's experts are where, over ranks and beside an accelerator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from moelora import attach
from moelora.errors import MoeloraError
from moelora.placement import spreading
from moelora.placement.beside import settling
from moelora.placement.beside.rates import Rates
from moelora.reporting import Report

BOTH = (
    "hot is for experts that one process has: where they are spread over ranks (owners, group), none of them "
    "can be on the accelerator as well"
)


def place(
    model: nn.Module,
    owners: str | Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    hot: int | Mapping[str, Iterable[int]] | None = None,
    batches: Iterable[Any] | None = None,
    way: str | None = None,
    rates: Rates | None = None,
) -> Report:
    """Say where an enabled model's experts are; over ranks first, then beside an accelerator.

    Over ranks: as `spreading.place` says, unless only the arguments behind `group` are given.
    Beside an accelerator that has the rest of the model, experts in host memory are found by `enable`. What
    is said about them here holds until it is said again:

    Args:
        owners: "spread", "rank0", or the rank in `group` of each expert.
        group: the ranks that share the experts; None for all.
        hot: how many experts of each layer are on the accelerator too, or which, by the layer's name: copies
            of their frozen weights, and their LoRA factors, which become parameters of their own there. So
            say it before the optimizer is made. Files have whole factors. Not for experts over ranks.
        batches: keyword arguments of some forwards, over which the most used experts are counted; without
            them the first ones of a layer are taken.
        way: "compute" where the weights are, "bring" them over a layer ahead, or "auto", a rule from rates
            that are measured in the first forward.
        rates: instead of those.
    Returns: the report, which tells what is where.
    Raises: MoeloraError for arguments that mean nothing to this model, and as `spreading.place` does.
    """
    further = (hot, batches, way, rates)
    if hot is not None and (owners is not None or group is not None or spreading.is_placed(model)):
        raise MoeloraError(BOTH)
    if owners is not None or group is not None or all(one is None for one in further):
        spreading.place(model, "spread" if owners is None else owners, group)
    if any(one is not None for one in further):
        settling.keep(model, hot, batches, way or "auto", rates)
    return attach.report(model)
