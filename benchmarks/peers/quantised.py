"""Packed weights: ours on them in place, and what one does without: a dense copy of them in every step.

`ours-F` for a format F of torch_moelora.formats, `ours-F-nested` where it has nested scales.
`bitsandbytes-F` turns the active experts' codes into a dense copy for our dense operators, in the forward and
again in the backward, as bitsandbytes' own product does. `bitsandbytes-F-kept` keeps the copy from forward to
backward, for which a model of many layers has no room; so does `bitsandbytes-F-loop` for the loop over
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torch_moelora import formats
from torch_moelora.formats import PackedWeight

from ..layer import DTYPES, LORA_NAMES, Case, Layer
from . import MODULES, loop
from .base import AutogradRunner, Contestant
from .ours import layer_function
from .packings import NESTED, Packings

KEPT, LOOP = "-kept", "-loop"
OURS, BITSANDBYTES, KT_KERNEL = "ours-", "bitsandbytes-", "kt-kernel-"


class Packed(Contestant):
    """What the contestants on packed weights have in common."""

    def __init__(self, prefix: str, name: str, suffix: str = "") -> None:
        self.name, self.format = prefix + name + suffix, name

    def missing_here(self, case: Case) -> str | None:
        if DTYPES[case.dtype].itemsize != 2 and self.name.startswith(BITSANDBYTES):
            return "bf16 or fp16 only"
        row = formats.FORMATS[self.format.removesuffix(NESTED)]
        group = row.groups.default or 1
        sizes = {k for _, k in case.shape.projections.values()}
        if row.groups.kind != "grid" and any(k % group for k in sizes):
            return f"groups of {group} do not divide rows of {min(k for k in sizes if k % group)}"
        return None

    def numbers(self, layer: Layer) -> dict[str, Tensor]:
        return Packings.of(layer, self.format).numbers()

    def weight_bytes(self, layer: Layer) -> int:
        return Packings.of(layer, self.format).nbytes


class OursPacked(Packed):
    own = True

    def version(self) -> str:
        import torch_moelora

        return f"torch_moelora {torch_moelora.__version__}, torch {torch.__version__}"

    def load_here(self, layer: Layer) -> AutogradRunner:
        from torch_moelora.functional import moe_mlp

        packed = Packings.of(layer, self.format)
        runner = AutogradRunner(
            layer_function(moe_mlp, layer, packed.weights), [layer.lora[name] for name in LORA_NAMES]
        )
        runner.packed = packed  # so that others find it
        return runner


class Dequantised(Packed):
    """bitsandbytes makes a dense copy of the experts that have rows."""

    def __init__(self, name: str, suffix: str) -> None:
        super().__init__(BITSANDBYTES, name, suffix)
        self.suffix = suffix
        self.stand_in = BITSANDBYTES + name if suffix == LOOP else None

    def missing_here(self, case: Case) -> str | None:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            return str(error)
        return super().missing_here(case)

    def version(self) -> str:
        import bitsandbytes

        return f"bitsandbytes {bitsandbytes.__version__}"

    def load_here(self, layer: Layer) -> AutogradRunner:
        packed = Packings.of(layer, self.format)
        forward = _on_copies(layer, packed, self.suffix)
        runner = AutogradRunner(forward, [layer.lora[name] for name in LORA_NAMES])
        runner.packed = packed
        return runner


def _on_copies(layer: Layer, packed: Packings, suffix: str):
    """The layer's function of (x, expert_idxs, gates), with a copy of the active experts in each call.

    Without a suffix the copy goes with the forward, and the backward makes its own.
    """
    from torch_moelora.functional import moe_mlp

    dtype, experts = DTYPES[layer.case.dtype], layer.shape.experts
    parts = {name: _unnested(weight) for name, weight in packed.weights.items()}

    def forward(x: Tensor, expert_idxs: Tensor, gates: Tensor) -> Tensor:
        active, ids = expert_idxs.unique(return_inverse=True)
        every = len(active) == experts
        chosen = (lambda t: t) if every else (lambda t: None if t is None else t[active])
        make = {name: partial(_copy, weight, chosen, dtype) for name, weight in parts.items()}
        copies = {name: copy() for name, copy in make.items()}
        biases = {name: chosen(bias) for name, bias in layer.biases.items()}
        lora = {name: chosen(value) for name, value in layer.lora.items()}
        shape = replace(layer.shape, experts=len(active))
        mine = Layer(replace(layer.case, shape=shape), copies, biases, lora)
        run = loop.make_forward(mine) if suffix == LOOP else layer_function(moe_mlp, mine, copies)
        with nullcontext() if suffix else _not_saved(copies, make):
            return run(x, ids, gates)

    return forward


def _not_saved(copies: dict[str, Tensor], make: dict[str, Callable[[], Tensor]]) -> saved_tensors_hooks:
    """Autograd keeps a copy's name instead of it, and has it made again when the backward asks."""
    names = {copy.data_ptr(): name for name, copy in copies.items()}
    return saved_tensors_hooks(
        lambda saved: names.get(saved.data_ptr(), saved),
        lambda kept: make[kept]() if isinstance(kept, str) else kept,
    )


def _unnested(weight: PackedWeight) -> PackedWeight:
    return weight.unnested("bitsandbytes") if weight.is_nested else weight


def _copy(weight: PackedWeight, chosen: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """The chosen experts, dense, by one call of bitsandbytes."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    codes, scale = chosen(weight.codes), chosen(weight.scale)
    n, k = weight.shape[1:]
    table = torch.tensor(formats.FORMATS[weight.format].codes, device=codes.device)
    state = QuantState(scale.flatten(), (len(codes) * n, k), table, k // scale.shape[2], weight.format, dtype)
    return dequantize_4bit(codes.view(-1, 1), state).view(-1, n, k)


def contestants_of(names: Iterable[str]) -> list[str]:
    """Those that run the formats `names`, ours first."""
    found = []
    for name in names:
        found.append(OURS + name)
        if formats.FORMATS[name.removesuffix(NESTED)].nested and not name.endswith(NESTED):
            found += [BITSANDBYTES + name + suffix for suffix in ("", KEPT, LOOP)]
        if KT_KERNEL + name in MODULES:
            found.append(KT_KERNEL + name)
    return found


def find(name: str) -> Contestant:
    """The contestant that `contestants_of` named."""
    if name.startswith(OURS):
        return OursPacked(OURS, name.removeprefix(OURS))
    inner = name.removeprefix(BITSANDBYTES)
    suffix = next((suffix for suffix in (KEPT, LOOP) if inner.endswith(suffix)), "")
    return Dequantised(inner.removesuffix(suffix), suffix)
