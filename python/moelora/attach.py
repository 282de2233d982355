"""`enable` and `disable`: the explicit step that puts a model's experts on the operators, and its undoing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from moelora import adapters, advice, experts, weights
from moelora.errors import MoeloraError
from moelora.linears import count, hook, unhook
from moelora.reporting import AdapterReport, LayerReport, Report
from moelora.watch import has_values, held, nonzero
from torch_moelora.formats import PackedWeight

# What wrappers of modules add to the names of what is inside.
_WRAPPERS = ("base_layer", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


def enable(model: nn.Module, linears: bool | None = None) -> Report:
    """Run a model's experts, and the PEFT adapters on them, on the operators.

    Works on the instance: experts modules get `experts_implementation="moelora"`, PEFT's expert wrappers hand
    them their LoRA factors as views. State dicts, parameters and their names stay as they are, but for
    parameters of hot experts' factors (see `place`). Call it again after adding adapters; undo it with
    `disable`.

    Args:
        model: a transformers model, or a `PeftModel` around one.
        linears: whether frozen linear layers, and PEFT's LoRA on them, run on the operators too. None: on a
            CPU LoRA on those in bf16, and all in 16 bits where torch has no fast product of these. Packed
            ones always do.
    Returns: which layers use the operators, which do not and why, and the adapters of each.
    Raises: MoeloraError if no layer can use them, or if a weight's codes were cast to numbers without their
        scales; the model is then unchanged.
    """
    found = {name: module for name, module in model.named_modules() if experts.is_experts(module)}
    by_module = adapters.wrappers(model)
    if not found:
        raise MoeloraError(
            f"{_kind(model)} has no expert layers that follow transformers' experts interface"
            + experts.outside(model)
        )
    _beside("take_over", model)
    bindings = _bindings(model, found)
    if all(binding.reason for binding in bindings.values()):
        _beside("release", model)
        name, binding = next(iter(bindings.items()))
        raise MoeloraError(
            f"no expert layer of {_kind(model)} can use the operators: {name} {binding.reason}"
        )
    _bind(found, bindings, by_module)
    for module in model.modules():
        if isinstance(module, LoraModel):
            adapters.hook_tuner(module)
    hook(model, linears)
    _beside("settle", model)
    if any(module._moelora.placements for module in found.values()):
        import_module("moelora.placement.spreading").adopt(model)
    return report(model)


def _bindings(model: nn.Module, found: dict[str, nn.Module]) -> dict[str, experts.Binding]:
    """New ones for the modules, by name, which are left as they are."""
    try:
        return {name: experts.bind(module, _plain(name)) for name, module in found.items()}
    except MoeloraError:
        if not any("_moelora" in vars(module) for module in found.values()):
            _beside("release", model)
        raise


def _bind(
    found: dict[str, nn.Module],
    bindings: dict[str, experts.Binding],
    by_module: dict[int, list[PeftParamWrapper]],
) -> None:
    """Gives the modules, by name, their bindings; their wrappers then hand factors to the operators."""
    for binding in bindings.values():  # layers share configurations, so every interface must know the name
        experts.register(binding.interface)
    # Layers share configurations, so what an enabled layer goes back to holds for a new one beside it.
    earlier = {id(m.config): m._moelora.previous for m in found.values() if hasattr(m, "_moelora")}
    for name, module in found.items():
        bindings[name].previous = earlier.get(id(module.config), bindings[name].previous)
        if hasattr(module, "_moelora"):
            bindings[name].watches = module._moelora.watches
            bindings[name].placements = module._moelora.placements
        module._moelora = bindings[name]
        for wrapper in by_module.get(id(module), []):
            adapters.hook(wrapper)
    for module in found.values():
        module.config._experts_implementation_internal = experts.IMPLEMENTATION


def disable(model: nn.Module) -> None:
    """Undo `enable`: every module and configuration is as it was. A model that is not enabled stays so.

    Raises: MoeloraError for a placed model, which has a part of its experts only.
    """
    for name, module in model.named_modules():
        if experts.is_experts(module) and any(
            weights.is_spread(module, weight) for weight in experts.projections(module)
        ):
            raise MoeloraError(f"{name} is spread over ranks, which cannot be undone: load the model anew")
    _beside("release", model)
    unhook(model)
    for module in model.modules():
        if isinstance(module, LoraModel):
            adapters.unhook_tuner(module)
        if isinstance(module, PeftParamWrapper):
            adapters.unhook(module)
        binding = vars(module).get("_moelora")
        if binding is not None:
            for watch in binding.watches.values():
                watch.stop()
            module.config._experts_implementation_internal = binding.previous
            del module._moelora


def _beside(step: str, model: nn.Module) -> None:
    """Experts in host memory, where there is an accelerator that they can be beside."""
    if torch.accelerator.is_available():
        getattr(import_module("moelora.placement.beside.settling"), step)(model)


def report(model: nn.Module) -> Report:
    """The state of an enabled model's expert layers and their adapters, as `enable` returns it.

    Raises: MoeloraError if weights were changed since, so that the operators cannot read them.
    """
    by_module = adapters.wrappers(model)
    with unset_fake_temporarily():  # which refuses tensors that are real
        layers = tuple(
            _layer(name, module, by_module.get(id(module), []))
            for name, module in model.named_modules()
            if vars(module).get("_moelora") is not None
        )
        adapted: dict[str, list[str]] = {}
        for layer in layers:
            for adapter in layer.adapters:
                adapted.setdefault(adapter.adapter, []).append(f"{layer.name}.{adapter.parameter}")
        on_operators = count(model)
        return Report(layers, tuple(advice.notes(model, adapted)), on_operators)


def _layer(name: str, module: nn.Module, wrappers: list[PeftParamWrapper]) -> LayerReport:
    binding = module._moelora
    return LayerReport(
        name=_plain(name),
        kind=type(module).__name__,
        path="transformers" if binding.reason else "operators",
        reason=binding.reason or "",
        experts=binding.experts,
        projections=experts.projections(module),
        gate="module" if "activation" in binding.activation else "fused",
        **_stored(module),
        weights="trainable" if any(p.requires_grad for p in module.parameters()) else "frozen",
        adapters=tuple(_adapter(w, name) for w in reversed(wrappers) for name in w.lora_A),
        places=tuple(map(str, binding.placements)),
    )


def _plain(name: str) -> str:
    """A module's name without what wrappers add to it."""
    inside = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return inside.removeprefix("base_model.model.")


def _stored(module: nn.Module) -> dict[str, Any]:
    """The format and bytes of the module's weights."""
    try:
        found = [weights.weight_of(module, name) for name in experts.projections(module)]
    except (ValueError, AttributeError):  # then the layer has a reason
        return {"format": "unknown", "nbytes": 0}
    names = {weight.format if isinstance(weight, PackedWeight) else "dense" for weight in found}
    return {"format": ", ".join(sorted(names)), "nbytes": sum(weight.nbytes for weight in found)}


def _adapter(wrapper: PeftParamWrapper, adapter: str) -> AdapterReport:
    tensors = [*held(wrapper.lora_A[adapter]), *held(wrapper.lora_B[adapter])]
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    # A rank without experts of a placed layer: what the others see cannot be told here.
    elsewhere = hasattr(wrapper.lora_A[adapter], "_moelora_part") and not any(t.numel() for t in tensors)
    watch = wrapper.get_base_layer()._moelora.watches.get((wrapper.parameter_name, adapter))
    active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if wrapper.merged:
        reason = "merged into the weights"
    elif type(wrapper) is PeftParamWrapper:
        reason = experts.LATE
    elif not isinstance(wrapper, adapters.ParamWrapper):
        reason = f"its wrapper is a {type(wrapper).__name__}"
    elif adapter in active:
        reason = _reason(adapters.served(wrapper, active))
    else:
        reason = _reason(adapters.served(wrapper, [adapter]))
    return AdapterReport(
        parameter=wrapper.parameter_name,
        adapter=adapter,
        rank=wrapper.r[adapter],
        path="PEFT" if reason else "operators",
        reason=reason or "",
        active=adapter in active and not wrapper.disable_adapters,
        trainable=any(tensor.requires_grad for tensor in tensors),
        gradient=any(bool(nonzero(t.grad)) for t in parameters if t.grad is not None and has_values(t.grad))
        or (watch.seen if watch is not None and not elsewhere else None),
        zero=_is_zero(wrapper.lora_B[adapter].weight),
    )


def _is_zero(factor: Tensor) -> bool:
    here = getattr(factor, "to_local", lambda: factor)()  # a shard may have no elements
    return has_values(here) and here.numel() > 0 and not bool(nonzero(here.detach()))


def _reason(served: list | str) -> str | None:
    return served if isinstance(served, str) else None


def _kind(model: nn.Module) -> str:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__
