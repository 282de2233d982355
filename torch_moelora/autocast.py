"""`scatter_lora` under torch.autocast.

x, weight and bias follow the autocast dtype; fp32 LoRA parameters and fp32 gates stay masters, which
`torch.library.register_autocast` cannot express: it casts every argument. The other operators need nothing:
they get what `scatter_lora` gave, or run in a backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import ScatterLora

HALVES = (torch.bfloat16, torch.float16)


def follow(device_type: str, call: ScatterLora) -> ScatterLora:
    """The call as `scatter_lora` takes it inside `torch.autocast(device_type)`.

    A half LoRA parameter or gate of another dtype than autocast's would be refused by the operator, so it
    follows too. fp64 is left alone, as everywhere under autocast.
    """
    dtype = torch.get_autocast_dtype(device_type)

    def cast(t: Tensor | None, eligible: tuple) -> Tensor | None:
        return t if t is None or t.dtype not in eligible else t.to(dtype)

    everything = (*HALVES, torch.float32)
    return call._replace(
        x=cast(call.x, everything),
        weight=cast(call.weight, everything),
        lora_a=cast(call.lora_a, HALVES),
        lora_b=cast(call.lora_b, HALVES),
        bias=cast(call.bias, everything),
        gates=cast(call.gates, HALVES),
    )


def _kernel(device_type: str, key: torch._C.DispatchKey):
    def scatter_lora(*args) -> Tensor:
        call = follow(device_type, ScatterLora(*args))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.moelora.scatter_lora(*call)

    return scatter_lora


def register(lib: torch.library.Library) -> None:
    """Registers the autocast kernels of `scatter_lora` with `lib`."""
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        lib.impl("scatter_lora", _kernel(device_type, getattr(torch._C.DispatchKey, key)), key)
