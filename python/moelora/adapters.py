"""PEFT's adapters on expert weights, with the operators in place of the built `W + scaling·B·A`.

PEFT wraps an experts module in one `ParamWrapper` for each adapted parameter; during its forward the
wrapper replaces the parameter by the sum with its delta. `hook` gives a wrapper instance a subclass of its
own class that instead hands views of its factors down to `experts_forward`, as an argument of the call.
Everything else (state dicts, merging, `isinstance`, adding and switching adapters) stays PEFT's own code.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraModel as PeftLoraModel
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moelora import hot_factors, weights
from moelora.errors import MoeloraError, warn_once
from moelora.experts import DTYPES, IMPLEMENTATION, LORA, Factors, projections
from moelora.hot_factors import HotFactors, Stored, by_expert
from moelora.watch import Watch, replaced
from torch_moelora.formats import PackedWeight

# PEFT changes the module for the time of a call, and torch has one cache of parametrizations for all threads.
_BY_PEFT = threading.RLock()


class ParamWrapper(PeftParamWrapper):
    """PEFT's `ParamWrapper` that hands its LoRA factors to the operators where they can use them."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        present = [name for name in self.active_adapters if name in self.lora_A]
        enabled = getattr(self.get_base_layer(), "_moelora", None) is not None
        if not enabled or not present or self.disable_adapters or self.merged or "adapter_names" in kwargs:
            return super().forward(x, *args, **kwargs)
        watch(self, running=True)
        with nullcontext() if torch.compiler.is_compiling() else _BY_PEFT:  # the weight may be away
            found = served(self, present)
            if isinstance(found, str):
                _refuse_copy(self, found)
        if isinstance(found, str):
            told = f"PEFT adds the LoRA of {self.parameter_name} to a copy of the weights: {found}"
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=told)  # which PEFT's own code would do, in other words
            return _by_peft(self, told, x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        several = [factors(self, name, *stored) for name, stored in zip(present, found, strict=True)]
        lora = {**kwargs.pop(LORA, {}), self.parameter_name: together(several)}
        return self.base_layer(x, *args, **kwargs, **{LORA: lora})

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        _refuse_copy(self, "merging would write into them")
        super().merge(safe_merge, adapter_names)
        _changed(self)

    def unmerge(self) -> None:
        super().unmerge()
        _changed(self)


def _changed(wrapper: PeftParamWrapper) -> None:
    """Tells placements that have copies of weights: PEFT writes into them behind their version's back."""
    binding = getattr(wrapper.get_base_layer(), "_moelora", None)
    for placement in () if binding is None else binding.placements:
        getattr(placement, "forget", lambda: None)()


class LoraModel(PeftLoraModel):
    """PEFT's `LoraModel` that refuses to merge into packed weights before it has merged into dense ones."""

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name, module in self.model.named_modules():
            if isinstance(module, PeftParamWrapper):
                _refuse_copy(module, "merging would write into them")
            elif isinstance(module, BaseTunerLayer) and weights.is_packed(module.get_base_layer(), "weight"):
                raise MoeloraError(f"{name} is packed: merging would write into its weight")


def _refuse_copy(wrapper: PeftParamWrapper, why: str) -> None:
    """Where experts are packed PEFT's own code makes a dense copy of all, or silently trains nothing."""
    module, name = wrapper.get_base_layer(), wrapper.parameter_name
    if weights.is_spread(module, name):
        raise MoeloraError(f"{name} is spread over ranks, and PEFT cannot add LoRA to it: {why}")
    if weights.is_packed(module, name):
        raise MoeloraError(f"{name} is packed, and PEFT cannot add LoRA to packed weights: {why}")


@torch.compiler.disable(reason="PEFT changes the module")
def _by_peft(wrapper: ParamWrapper, told: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    warn_once(told)
    wrapper.get_base_layer()._moelora.by_peft.add(wrapper.parameter_name)
    with _BY_PEFT:
        return PeftParamWrapper.forward(wrapper, x, *args, **kwargs)


def served(wrapper: PeftParamWrapper, adapters: list[str]) -> list[tuple[Stored, Stored]] | str:
    """A and B of this wrapper's active `adapters`, if the operators can apply them, or why not."""
    module = wrapper.get_base_layer()
    binding = getattr(module, "_moelora", None)
    if binding is None:
        return "the layer is not enabled"
    if binding.reason is not None:
        return binding.reason
    if module.config._experts_implementation != IMPLEMENTATION:
        return f"the experts implementation is {module.config._experts_implementation!r}"
    if wrapper.parameter_name not in projections(module):
        return f"{wrapper.parameter_name} is not a projection's weight"
    found = []
    for adapter in adapters:
        a, b = hot_factors.stored(wrapper.lora_A[adapter], wrapper.lora_B[adapter])
        reason = _unusable(wrapper, adapter, a[0], b[0])
        if reason is not None:
            return reason if len(adapters) == 1 else f"of {adapter}, {reason}"
        found.append((a, b))
    return found


def factors(wrapper: PeftParamWrapper, adapter: str, a: Stored, b: Stored) -> Factors:
    """One adapter's factors as views, of those experts that are here."""
    rank, hot = wrapper.r[adapter], None
    if a[1] is not None:  # and b's, too
        _warn_of_unknown(a, b)
        hot = HotFactors(a[1].ids, by_expert(a[1].part, 0, rank), by_expert(b[1].part, 1, rank))
    return Factors(by_expert(a[0], 0, rank), by_expert(b[0], 1, rank), float(wrapper.scaling[adapter]), hot)


def _warn_of_unknown(*several: Stored) -> None:
    """Of an optimizer that was made before a factor was split."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    (a, of_a), (b, of_b) = several
    if of_a.left_behind(a) or of_b.left_behind(b):
        warn_once(
            "LoRA of hot experts stays as it is while that of the others is trained: the optimizer does not "
            "know its parameters. Make it after moelora.place(hot=...), and after moelora.enable where "
            "adapters came late"
        )


def together(several: list[Factors]) -> Factors:
    """One adapter that does what `several` do: their ranks side by side. A copy of the factors, if there are
    two or more; gradients go to each one's own.
    """
    if len(several) == 1:
        return several[0]
    whose = {None if one.hot is None else one.hot.ids for one in several}
    if len(whose) == 1 and None not in whose:
        here = together([one._replace(hot=None) for one in several])
        there = together([Factors(one.hot.a, one.hot.b, one.scaling) for one in several])
        return here._replace(hot=HotFactors(several[0].hot.ids, there.a, there.b))
    several = [one.joined() for one in several]
    if all(factors.scaling == several[0].scaling for factors in several):  # nothing to fold into B
        pairs, scaling = [(f.a, f.b) for f in several], several[0].scaling
    else:  # in float32: a half-precision B would be rounded once more
        pairs, scaling = [(_wide(f.a), _wide(f.b) * f.scaling) for f in several], 1.0
    return Factors(torch.cat([a for a, _ in pairs], 1), torch.cat([b for _, b in pairs], 2), scaling)


def _wide(factor: Tensor) -> Tensor:
    return factor.float() if factor.dtype.itemsize == 2 else factor


def _unusable(wrapper: PeftParamWrapper, adapter: str, a: Tensor, b: Tensor) -> str | None:
    """What is unusual about one adapter's tensors, or None."""
    module, name = wrapper.get_base_layer(), wrapper.parameter_name
    weight = weights.weight_of(module, name)
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes, which PEFT's LoRA on them does not support"
    if wrapper.num_experts == 1:
        return "a single expert is a plain matrix to PEFT"
    if (len(weight.shape), a.ndim, b.ndim) == (3, 2, 2):  # between calls FSDP1 has them flat
        experts, out, inner = weights.oriented(module, weight).shape
        rows = experts * wrapper.r[adapter]
        if (a.shape, b.shape) != ((rows, inner), (out, rows)):
            shapes = f"{[rows, inner]} and {[out, rows]}"
            return f"its factors are {list(a.shape)} and {list(b.shape)}, expected {shapes}"
    if b.dtype != a.dtype or a.dtype not in DTYPES:
        return f"its factors are {a.dtype} and {b.dtype}"
    if isinstance(weight, PackedWeight):
        return None
    if a.dtype != weight.dtype and not (a.dtype == torch.float32 and weight.dtype.itemsize == 2):
        return f"its factors are {a.dtype} beside {weight.dtype} weights"
    return None


def wrappers(model: nn.Module) -> dict[int, list[PeftParamWrapper]]:
    """PEFT's parameter wrappers by the id of the module whose parameter they adapt, outermost first."""
    found: dict[int, list[PeftParamWrapper]] = {}
    for module in model.modules():
        if isinstance(module, PeftParamWrapper):
            found.setdefault(id(module.get_base_layer()), []).append(module)
    return found


def hook(wrapper: PeftParamWrapper) -> None:
    """Let a wrapper hand its factors to the operators."""
    if type(wrapper) is PeftParamWrapper:
        wrapper.__class__ = ParamWrapper
    watch(wrapper, running=False)


def watch(wrapper: PeftParamWrapper, running: bool) -> None:
    """Look out for gradients of the wrapper's adapters, those that came since the last call too.

    `running`: a forward is about to use the active ones.
    """
    watches = wrapper.get_base_layer()._moelora.watches
    for adapter in wrapper.lora_A:
        key, factors = (wrapper.parameter_name, adapter), (wrapper.lora_A[adapter], wrapper.lora_B[adapter])
        if not torch.compiler.is_compiling():
            watches.setdefault(key, Watch()).follow(*factors, running)
        elif key in watches and any(map(replaced, factors)):
            watches[key].blind = True  # no hooks in a graph


def hook_tuner(tuner: PeftLoraModel) -> None:
    """Let a tuner tell what is packed before it merges."""
    if type(tuner) is PeftLoraModel:
        tuner.__class__ = LoraModel


def unhook_tuner(tuner: PeftLoraModel) -> None:
    """Give a tuner its class back."""
    if type(tuner) is LoraModel:
        tuner.__class__ = PeftLoraModel


def unhook(wrapper: PeftParamWrapper) -> None:
    """Give a wrapper its class back."""
    if type(wrapper) is ParamWrapper:
        wrapper.__class__ = PeftParamWrapper
