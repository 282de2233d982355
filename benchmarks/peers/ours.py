"""torch_moelora.functional.moe_mlp: as it is, under torch.compile, and batch-invariant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..layer import LORA_NAMES, SCALING, Case, Layer
from .base import AutogradRunner, Contestant


@contextmanager
def _batch_invariant() -> Iterator[None]:
    """The switch is the process's: the other contestants run without."""
    import torch_moelora

    torch_moelora.set_batch_invariant(True)
    try:
        yield
    finally:
        torch_moelora.set_batch_invariant(False)


class _InvariantRunner(AutogradRunner):
    def _step(self, *args):
        with _batch_invariant():
            return super()._step(*args)


def _invariantly(operator: Callable) -> Callable:
    def call(*args, **kwargs):
        with _batch_invariant():
            return operator(*args, **kwargs)

    return call


def layer_function(moe_mlp: Callable, layer: Layer, weights: dict) -> Callable:
    """The layer on `weights` (dense or packed, by projection) as a function of (x, expert_idxs, gates)."""
    keywords = {
        **layer.lora,
        "gate_up_scaling": SCALING,
        "down_scaling": SCALING,
        "gate_up_bias": layer.biases["gate_up"],
        "down_bias": layer.biases["down"],
        **layer.shape.glu,
    }

    def forward(x, expert_idxs, gates):
        return moe_mlp(x, expert_idxs, gates, weights["gate_up"], weights["down"], **keywords)

    return forward


class Ours(Contestant):
    own = True

    def __init__(self, name: str, compiled: bool = False, invariant: bool = False) -> None:
        self.name, self.compiled, self.invariant = name, compiled, invariant

    def missing_here(self, case: Case) -> str | None:
        try:
            import torch_moelora
        except ImportError as error:
            return str(error)
        if self.invariant and not hasattr(torch_moelora, "set_batch_invariant"):
            return f"torch_moelora {torch_moelora.__version__} has no set_batch_invariant"
        return None

    def version(self) -> str:
        import torch_moelora

        return f"torch_moelora {torch_moelora.__version__}, torch {torch.__version__}"

    def load_here(self, layer: Layer) -> AutogradRunner:
        from torch_moelora.functional import moe_mlp

        call = torch.compile(moe_mlp, fullgraph=True, dynamic=True) if self.compiled else moe_mlp
        runner = _InvariantRunner if self.invariant else AutogradRunner
        forward = layer_function(call, layer, layer.weights)
        return runner(forward, [layer.lora[name] for name in LORA_NAMES])

    def operators(self) -> dict[str, Callable]:
        from torch_moelora.schemas import SCHEMAS

        if self.compiled:
            return {}
        found = {name: getattr(torch.ops.moelora, name) for name in SCHEMAS}
        return {name: _invariantly(op) for name, op in found.items()} if self.invariant else found


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Ours("ours"),
        Ours("ours-compiled", compiled=True),
        Ours("ours-batch-invariant", invariant=True),
    )
}
