"""Contestants made of torch's own products, in fp32 beside a layer in bf16 or fp16: what one would run where
torch's products in those are hopeless (`benchmarks.products`).

Weights, which all of them share, and adapters are widened when the layer is loaded and stay so: memory that
the table counts as beyond the weights. A batch is widened before its time begins.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

from torch import Tensor

from ..layer import Batch, Case, Layer
from . import grouped_mm, loop, transformers_peft
from .base import Contestant, Results, Runner

SUFFIX = "-fp32"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().float().requires_grad_(tensor.requires_grad)


def _wide_case(case: Case) -> Case:
    return replace(case, dtype="fp32", lora_dtype="fp32")


class _WideWeights:
    """Weights and biases of a layer, for all who hold them at the same time."""

    latest: weakref.ref[_WideWeights] | None = None

    def __init__(self, layer: Layer) -> None:
        self.source = weakref.ref(layer.weights["down"])
        self.weights = {name: _wide(weight) for name, weight in layer.weights.items()}
        self.biases = {name: None if bias is None else _wide(bias) for name, bias in layer.biases.items()}

    @classmethod
    def of(cls, layer: Layer) -> _WideWeights:
        found = cls.latest() if cls.latest else None
        if found is None or found.source() is not layer.weights["down"]:
            found = cls(layer)
            cls.latest = weakref.ref(found)
        return found


def _wide_batch(batch: Batch) -> Batch:
    x, gates, dy = (_wide(t) for t in (batch.x, batch.gates, batch.dy))
    return Batch(x, batch.expert_idxs, gates, dy, _wide_case(batch.case))


class _Widened(Runner):
    def __init__(self, inner: Runner, weights: _WideWeights) -> None:
        self.inner, self.weights = inner, weights

    def time(self, batch: Batch) -> tuple[float, float]:
        return self.inner.time(_wide_batch(batch))

    def results(self, batch: Batch) -> Results:
        return self.inner.results(_wide_batch(batch))


class InFp32(Contestant):
    devices = ("cpu",)

    def __init__(self, inner: Contestant) -> None:
        self.inner, self.name = inner, inner.name + SUFFIX

    def missing_here(self, case: Case) -> str | None:
        if case.dtype == "fp32":
            return f"the layer is in fp32: {self.inner.name} is the same"
        return self.inner.missing_here(_wide_case(case))

    def version(self) -> str:
        return self.inner.version()

    def load_here(self, layer: Layer) -> Runner:
        wide = _WideWeights.of(layer)
        lora = {name: _wide(value) for name, value in layer.lora.items()}
        runner = self.inner.load_here(Layer(_wide_case(layer.case), wide.weights, wide.biases, lora))
        return _Widened(runner, wide)


CONTESTANTS = {
    contestant.name: contestant
    for module in (loop, transformers_peft, grouped_mm)
    for contestant in map(InFp32, module.CONTESTANTS.values())
}
