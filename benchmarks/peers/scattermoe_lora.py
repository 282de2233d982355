"""axolotl's scattermoe_lora: its Triton kernels, without the trainer around them.

Adapters are held in the kernels' own layout, so the repacking from PEFT's that axolotl does in each step is
left out. Options are those of axolotl's own expert layer.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from torch import Tensor

from ..layer import LORA_NAMES, SCALING, Case, Layer
from .base import AutogradRunner, Contestant
from .glu import glu

PACKAGE = "axolotl.integrations.kernels"


def _import_kernels() -> ModuleType:
    """The package above the kernels imports the whole trainer: an empty one stands in for it."""
    if PACKAGE not in sys.modules:
        parent = importlib.import_module("axolotl.integrations")
        stand_in = ModuleType(PACKAGE)
        stand_in.__path__ = [f"{folder}/kernels" for folder in parent.__path__]
        sys.modules[PACKAGE] = stand_in
    return importlib.import_module(f"{PACKAGE}.libs.scattermoe_lora")


def _stored_lora(layer: Layer) -> list[Tensor]:
    """A [E·R, K] and B [N, E·R], the rank as its fastest dimension, in the order of LORA_NAMES."""
    out = []
    for name in LORA_NAMES:
        value = layer.lora[name].detach()
        stored = value.flatten(0, 1) if name.endswith("_a") else value.transpose(0, 1).flatten(1)
        out.append(stored.contiguous().requires_grad_())
    return out


def _views(layer: Layer):
    experts, rank = layer.shape.experts, layer.case.rank

    def as_ours(grads: list[Tensor]) -> list[Tensor]:
        return [
            grad.view(experts, rank, -1)
            if name.endswith("_a")
            else grad.view(-1, experts, rank).transpose(0, 1)
            for name, grad in zip(LORA_NAMES, grads, strict=True)
        ]

    return as_ours


def make_forward(layer: Layer, kernels: ModuleType, lora: list[Tensor]):
    shape, biases = layer.shape, layer.biases
    up, down = (layer.weights[name].transpose(1, 2) for name in ("gate_up", "down"))
    options = {"use_fused_dX": True, "use_fused_gather": True}

    def forward(x: Tensor, expert_idxs: Tensor, gates: Tensor) -> Tensor:
        route = kernels.flatten_sort_count(expert_idxs, num_experts=shape.experts)
        a, b, down_a, down_b = lora
        h = kernels.parallel_linear_lora(
            x, up, shape.top_k, *route, a, b, SCALING,
            expert_biases=biases["gate_up"], grouped_out=True, **options,
        )  # fmt: skip
        return kernels.parallel_linear_lora(
            glu(h, **shape.glu), down, 1, *route, down_a, down_b, SCALING,
            expert_biases=biases["down"], grouped_in=True, gates=gates, **options,
        )  # fmt: skip

    return forward


class ScatterMoELoRA(Contestant):
    name = "scattermoe"
    devices = ("cuda",)

    def missing_here(self, case: Case) -> str | None:
        if case.lora_dtype != case.dtype:
            return "adapters must have the weights' dtype"
        try:
            _import_kernels()
        except (ImportError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def version(self) -> str:
        try:
            return f"axolotl {version('axolotl')}, torch {torch.__version__}"
        except PackageNotFoundError:
            return f"axolotl of unknown version, torch {torch.__version__}"

    def load_here(self, layer: Layer) -> AutogradRunner:
        lora = _stored_lora(layer)
        return AutogradRunner(make_forward(layer, _import_kernels(), lora), lora, _views(layer))


CONTESTANTS = {"scattermoe": ScatterMoELoRA()}
