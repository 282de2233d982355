"""torch_moelora.functional.moe_mlp, as it is and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..layer import LORA_NAMES, SCALING, Case, Layer
from .base import AutogradRunner, Contestant


class Ours(Contestant):
    def __init__(self, name: str, compiled: bool) -> None:
        self.name, self.compiled = name, compiled

    def missing_here(self, case: Case) -> str | None:
        try:
            import torch_moelora  # noqa: F401
        except ImportError as error:
            return str(error)
        return None

    def version(self) -> str:
        import torch_moelora

        return f"torch_moelora {torch_moelora.__version__}, torch {torch.__version__}"

    def load_here(self, layer: Layer) -> AutogradRunner:
        from torch_moelora.functional import moe_mlp

        call = torch.compile(moe_mlp, fullgraph=True, dynamic=True) if self.compiled else moe_mlp
        keywords = {
            **layer.lora,
            "gate_up_scaling": SCALING,
            "down_scaling": SCALING,
            "gate_up_bias": layer.biases["gate_up"],
            "down_bias": layer.biases["down"],
            **layer.shape.glu,
        }
        weights = layer.weights

        def forward(x, expert_idxs, gates):
            return call(x, expert_idxs, gates, weights["gate_up"], weights["down"], **keywords)

        return AutogradRunner(forward, [layer.lora[name] for name in LORA_NAMES])

    def operators(self) -> dict[str, Callable]:
        from torch_moelora.schemas import SCHEMAS

        return {} if self.compiled else {name: getattr(torch.ops.moelora, name) for name in SCHEMAS}


CONTESTANTS = {name: Ours(name, compiled) for name, compiled in (("ours", False), ("ours-compiled", True))}
