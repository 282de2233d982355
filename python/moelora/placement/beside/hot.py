"""Some experts of a layer in the accelerator's own memory: which, copies of their weights, LoRA there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import MoeloraError
from moelora.hot_factors import HotFactors, joined
from moelora.placement.spreading import of_experts
from torch_moelora.formats import PackedWeight

WEIGHTS = ("gate_up_weight", "down_weight")
BIASES = ("gate_up_bias", "down_bias")
FACTORS = tuple(f"{name}_lora_{side}" for name in ("gate_up", "down") for side in "ab")


@dataclass(frozen=True)
class Lent:
    """LoRA factors of hot experts `ids` on the accelerator, [H, ...] by `moe_mlp`'s names for them."""

    ids: tuple[int, ...] = ()
    factors: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(parameters: dict[str, Any]) -> tuple[dict[str, Any], Lent]:
        """`parameters` as `experts.Placement` has them, without what is lent, and that."""
        hot: dict[str, HotFactors] = parameters.get("hot", {})
        rest = {name: value for name, value in parameters.items() if name != "hot"}
        whose = {one.ids for one in hot.values()}
        if len(whose) > 1:  # one is no longer where `place` has put it
            raise MoeloraError("hot experts' LoRA is of several sets of experts: call moelora.enable(model)")
        sides = {
            f"{name}_lora_{side}": t for name, one in hot.items() for side, t in (("a", one.a), ("b", one.b))
        }
        return rest, Lent(next(iter(whose), ()), sides)

    def joined(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """`parameters` with all experts' factors, where the others' are."""
        whole = {name: joined(parameters[name], self.ids, t) for name, t in self.factors.items()}
        return parameters | whole

    def complete(self, parameters: dict[str, Any], ids: Sequence[int], device: torch.device) -> bool:
        """Whether all of the factors are lent, of these experts, on `device`; so where there are none."""
        present = {name for name in FACTORS if parameters.get(name) is not None}
        whole = self.factors.keys() == present and all(t.device == device for t in self.factors.values())
        return whole and (not present or self.ids == tuple(ids))


class Hot:
    """Experts `ids` of a layer on `device`: frozen weights and biases there."""

    def __init__(
        self, ids: list[int], experts: int, parameters: dict[str, Any], device: torch.device
    ) -> None:
        self.ids = sorted(ids)
        self.weights = {
            name: of_experts(parameters[name], self.ids).to(device)
            for name in WEIGHTS + BIASES
            if parameters.get(name) is not None
        }
        rows = torch.tensor(self.ids)
        local = torch.full((experts + 1,), len(self.ids), dtype=torch.int64)  # the last is everybody else's
        local[rows] = torch.arange(len(self.ids))
        self.rows, self._local, self._experts = rows.to(device), local.to(device), experts
        self._elsewhere = torch.arange(experts + 1).index_fill(0, rows, experts)

    def used_on(self, stream: torch.Stream) -> None:
        """Keeps the copies' memory from others until what `stream` has been given is done, when they go."""
        for weight in (self.rows, self._local, *self.weights.values()):
            for tensor in weight.tensors if isinstance(weight, PackedWeight) else (weight,):
                tensor.record_stream(stream)

    @property
    def nbytes(self) -> int:
        """On the device."""
        return sum(weight.nbytes for weight in self.weights.values())

    def here(self, ids: Tensor) -> Tensor:
        """ids [T, top_k] among the hot experts, on the device; all others are sentinels."""
        return self._local[_bounded(ids, self._experts)]

    def elsewhere(self, ids: Tensor) -> Tensor:
        """ids [T, top_k] among all experts, on the host; the hot ones are sentinels."""
        return self._elsewhere[_bounded(ids, self._experts)]


def _bounded(ids: Tensor, experts: int) -> Tensor:
    """Sentinels of any kind as `experts`."""
    return ids.long().where((ids >= 0) & (ids < experts), experts)


def choose(
    layers: Mapping[str, Any], hot: int | Mapping[str, Iterable[int]], counts: Mapping[str, Tensor]
) -> dict[str, list[int]]:
    """The hot experts of each layer, by its name.

    hot: how many in each: the most used of `counts` [E] (of equals the first), or the first where nothing was
    counted; or which.
    Raises: MoeloraError for a number or experts that a layer does not have.
    """
    found = {}
    if not isinstance(hot, int) and (unknown := set(hot) - set(layers)):
        raise MoeloraError(f"hot: expected names of expert layers {sorted(layers)}, got {sorted(unknown)}")
    for name, layer in layers.items():
        experts = layer.experts
        if isinstance(hot, int):
            if isinstance(hot, bool) or not 0 <= hot <= experts:
                raise MoeloraError(f"hot: expected 0 to {experts} experts for {name}, got {hot}")
            used = counts.get(name, torch.zeros(experts))
            found[name] = sorted(used.sort(descending=True, stable=True).indices[:hot].tolist())
            continue
        found[name] = sorted(set(hot.get(name, ())))
        if any(not isinstance(e, int) or not 0 <= e < experts for e in found[name]):
            raise MoeloraError(f"hot: expected experts 0 to {experts - 1} for {name}, got {found[name]}")
    return found


@torch.no_grad()
def count(model: nn.Module, layers: Mapping[str, Any], batches: Iterable[Any]) -> dict[str, Tensor]:
    """How often each expert of each layer is chosen as the model runs on `batches`: keyword arguments."""
    run: Callable[..., Any] = model
    training = model.training
    for layer in layers.values():
        layer.counts = torch.zeros(layer.experts, dtype=torch.int64)
    model.eval()
    try:
        for batch in batches:
            run(**batch)
        return {name: layer.counts for name, layer in layers.items()}
    finally:
        model.train(training)
        for layer in layers.values():
            layer.counts = None
