"""PEFT's adapters on expert weights, with the operators in place of the built `W + scaling·B·A`.

PEFT wraps an experts module in one `ParamWrapper` for each adapted parameter; during its forward the
wrapper replaces the parameter by the sum with its delta (`_activate_lora`). `hook` gives a wrapper instance
a subclass of its own class that instead lends the operators views of its factors. Everything else (state
dicts, merging, `isinstance`, adding and switching adapters) stays PEFT's own code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import nn

from moelora.errors import warn_once
from moelora.experts import DTYPES, IMPLEMENTATION, Factors, projections
from moelora.watch import Watch


class ParamWrapper(PeftParamWrapper):
    """PEFT's `ParamWrapper` that lends its LoRA factors to the operators where they can use them."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        present = [name for name in active_adapters if name in self.lora_A]
        reason = unserved(self, present)
        binding = getattr(self.get_base_layer(), "_moelora", None)
        if binding is not None and not torch.compiler.is_compiling():
            watch(self)
        if reason is not None:
            if present and binding is not None:
                warn_once(f"PEFT adds the LoRA of {self.parameter_name} to a copy of the weights: {reason}")
                binding.by_peft.add(self.parameter_name)
            with super()._activate_lora(active_adapters):
                yield
            return
        binding.lora[self.parameter_name] = factors(self, present[0])
        try:
            yield
        finally:
            del binding.lora[self.parameter_name]


def factors(wrapper: PeftParamWrapper, adapter: str) -> Factors:
    """One adapter's factors as views. PEFT keeps A as [E·R, K] and B as [N, R·E], the expert fastest."""
    experts = wrapper.num_experts
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    return Factors(
        a.unflatten(0, (experts, -1)),
        b.unflatten(1, (-1, experts)).permute(2, 0, 1),
        float(wrapper.scaling[adapter]),
    )


def unserved(wrapper: PeftParamWrapper, adapters: list[str]) -> str | None:
    """Why the operators cannot apply `adapters`, this wrapper's active ones, or None if they can."""
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
    if len(adapters) != 1:
        return f"{len(adapters)} adapters are active, activate one with set_adapter"
    return _unusable(wrapper, adapters[0])


def _unusable(wrapper: PeftParamWrapper, adapter: str) -> str | None:
    """What is unusual about one adapter's tensors, or None."""
    module, name = wrapper.get_base_layer(), wrapper.parameter_name
    weight = getattr(module, name)
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes, which PEFT's LoRA on them does not support"
    experts, out, inner = weight.transpose(1, 2).shape if module.is_transposed else weight.shape
    if experts == 1:
        return "a single expert is a plain matrix to PEFT"
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    rank = wrapper.r[adapter]
    if (a.shape, b.shape) != ((experts * rank, inner), (out, rank * experts)):
        return (
            f"its factors are {list(a.shape)} and {list(b.shape)}, "
            f"expected {[experts * rank, inner]} and {[out, rank * experts]}"
        )
    if b.dtype != a.dtype or a.dtype not in DTYPES:
        return f"its factors are {a.dtype} and {b.dtype}"
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
    """Let a wrapper lend its factors to the operators."""
    if type(wrapper) is PeftParamWrapper:
        wrapper.__class__ = ParamWrapper
    watch(wrapper)


def watch(wrapper: PeftParamWrapper) -> None:
    """Look out for gradients of the wrapper's adapters, those that came since the last call too."""
    watches = wrapper.get_base_layer()._moelora.watches
    for adapter in wrapper.lora_A:
        key = wrapper.parameter_name, adapter
        if key not in watches:
            watches[key] = Watch()
        watches[key].follow(wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight)


def unhook(wrapper: PeftParamWrapper) -> None:
    """Give a wrapper its class back."""
    if type(wrapper) is ParamWrapper:
        wrapper.__class__ = PeftParamWrapper
