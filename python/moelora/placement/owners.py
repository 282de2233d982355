"""Which rank has which expert."""

from __future__ import annotations

from collections.abc import Sequence

from moelora.errors import MoeloraError

SPREAD, RANK0 = "spread", "rank0"


def owners_of(owners: str | Sequence[int], experts: int, world: int, where: str = "the model") -> list[int]:
    """The rank of each of a layer's experts.

    Args:
        owners: "spread" (neighbouring experts together, as many on every rank as on any other, or one more),
            "rank0" (all on rank 0), or the rank of each expert.
        experts, world: how many there are. where: the layer, for errors.

    Raises: MoeloraError for any other word, and for a list of another length or with other ranks.
    """
    if isinstance(owners, str):
        if owners == SPREAD:
            return [expert * world // experts if experts >= world else expert for expert in range(experts)]
        if owners == RANK0:
            return [0] * experts
        raise MoeloraError(f'owners must be "{SPREAD}", "{RANK0}" or the rank of each expert, got {owners!r}')
    ranks = [int(rank) for rank in owners]
    if len(ranks) != experts:
        raise MoeloraError(
            f"owners must name {experts} ranks, one for each expert of {where}, got {len(ranks)}"
        )
    if wrong := [rank for rank in ranks if not 0 <= rank < world]:
        raise MoeloraError(f"owners must be ranks from 0 to {world - 1}, got {wrong[0]}")
    return ranks
