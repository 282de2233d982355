"""Finds layers whose experts are in host memory while the rest of the model is on an accelerator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from moelora import adapters, experts, hot_factors, weights
from moelora.errors import MoeloraError
from moelora.placement.beside import hot as hot_experts
from moelora.placement.beside.layer import WAYS, Beside, Neighbours
from moelora.placement.beside.rates import Rates
from moelora.placement.beside.shared import shared_of

HOOKS = "_moelora_hooks"  # on an experts module: accelerate's, which `release` gives back


def take_over(model: nn.Module) -> None:
    """Takes accelerate's offloading off experts that it keeps in host memory: their weights are there again
    between calls, instead of being copied to the accelerator, all of them unpacked, in every one.
    """
    wrappers = adapters.wrappers(model)
    for name, module in model.named_modules():
        if not experts.is_experts(module):
            continue
        found = [(inner, inner._hf_hook) for inner in module.modules() if hasattr(inner, "_hf_hook")]
        if any(_in_memory(hook) for _, hook in found):
            if any(p.is_meta for one in wrappers.get(id(module), ()) for p in one.lora_B.parameters()):
                raise MoeloraError(
                    f"PEFT has put the LoRA of {name} on meta, where accelerate shows offloaded weights: "
                    "call moelora.enable(model) before adapters are added too"
                )
            for inner, hook in found:
                _stay_here(hook)
                remove_hook_from_module(inner)
            vars(module)[HOOKS] = found


def _in_memory(hook: Any) -> bool:
    """Whether a hook, or one of several, offloads to memory and not to a disk."""
    several = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    for one in several:
        if isinstance(one, AlignDevicesHook) and one.offload:
            kept = getattr(one.weights_map, "dataset", one.weights_map)
            if not getattr(kept, "index", None):  # of files
                return True
    return False


def _stay_here(hook: Any) -> None:
    """Where a hook puts weights when it goes: it may have found them on the accelerator."""
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook) and one.offload:
            one.original_devices = dict.fromkeys(one.original_devices, torch.device("cpu"))


def settle(model: nn.Module) -> None:
    """Gives a placement to the enabled layers of `model` that need one, if they have none, and adapters that
    have come the hot experts' part of their factors.
    """
    device = _accelerator_of(model)
    if device is None:
        return
    layers = [m for m in model.modules() if vars(m).get("_moelora") is not None]
    known = [one for module in layers if (one := beside(module)) is not None]
    together = known[0].together if known else Neighbours()
    for module in layers:
        binding = module._moelora
        if binding.reason is not None or beside(module) is not None:
            continue
        if weights.weight_of(module, experts.projections(module)[1]).device.type == "cpu":
            placement = Beside(module, binding.experts, together)
            placement.device = device
            binding.placements = (*binding.placements, placement)
    _find_shared(model)
    _split_factors(model, device)


def _find_shared(model: nn.Module) -> None:
    """Lets placements know of the shared experts of their blocks."""
    for block in model.modules():
        for name, child in block.named_children():
            module = child.get_base_layer() if isinstance(child, ParamWrapper) else child
            placement = beside(module)
            if placement is None:
                continue
            known = placement.shared
            if known is not None and getattr(block, known.name, None) is not known.module:
                known.release()  # somebody has put another module in its place
                known = None
            placement.shared = known or shared_of(block, name, module)


def _split_factors(model: nn.Module, device: torch.device | None) -> None:
    """LoRA of hot experts is where they are, and that of all others where those are."""
    for several in adapters.wrappers(model).values():
        placement = beside(several[0].get_base_layer())
        if placement is None:
            continue
        for wrapper in several:
            for adapter, rank in wrapper.r.items():
                a, b = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
                hot_factors.split(a, b, rank, placement.ids, placement.device or device)
            adapters.watch(wrapper, running=False)


def _accelerator_of(model: nn.Module) -> torch.device | None:
    """Where some of the model is, other than in host memory."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    return next((t.device for t in model.parameters() if t.device.type == accelerator.type), None)


def release(model: nn.Module) -> None:
    """Gives accelerate its hooks back, and adapters their factors in one piece."""
    for several in adapters.wrappers(model).values():
        for wrapper in several:
            for layer in (*wrapper.lora_A.values(), *wrapper.lora_B.values()):
                hot_factors.join(layer)
    for module in model.modules():
        placement = beside(module)
        if placement is not None and placement.shared is not None:
            placement.shared.release()
            placement.shared = None
        for inner, hook in vars(module).pop(HOOKS, ()):
            add_hook_to_module(inner, hook)


def beside(module: nn.Module) -> Beside | None:
    """The placement of an experts module, if it has one of this kind."""
    binding = vars(module).get("_moelora")
    placements = () if binding is None else binding.placements
    return next((one for one in placements if isinstance(one, Beside)), None)


def keep(
    model: nn.Module,
    hot: int | Mapping[str, Iterable[int]] | None,
    batches: Iterable[Any] | None,
    way: str,
    rates: Rates | None,
) -> None:
    """`place`'s part beside an accelerator; its docstring says what the arguments are."""
    if way not in WAYS:
        raise MoeloraError(f"way: expected one of {', '.join(WAYS)}, got {way!r}")
    layers = {
        name.removeprefix("base_model.model.").replace("base_layer.", "").removesuffix(".base_layer"): found
        for name, module in model.named_modules()
        if (found := beside(module)) is not None
    }
    if not layers:
        raise MoeloraError(
            "hot, batches and way are for experts in host memory beside an accelerator, and no layer's are: "
            "load with a device_map that puts them on the cpu, then call moelora.enable(model)"
        )
    device = _accelerator_of(model)
    counts = {} if batches is None else hot_experts.count(model, layers, batches)
    if hot is not None:
        for name, ids in hot_experts.choose(layers, hot, counts).items():
            layers[name].keep(ids, device)
        _split_factors(model, device)
    for layer in layers.values():
        layer.together.way, layer.together.rates = way, rates
