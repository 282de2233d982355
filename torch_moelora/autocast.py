"""`scatter_lora` under torch.autocast.

x, weight and bias follow the autocast dtype; fp32 LoRA parameters and fp32 gates stay masters, which
`torch.library.register_autocast` cannot express: it casts every argument. The other operators need nothing:
they get what `scatter_lora` gave, or run in a backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def follow(
    device_type: str, x: Tensor, weight: Tensor, lora_a, lora_b, bias, gates
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The arguments as `scatter_lora` takes them inside `torch.autocast(device_type)`.

    A half LoRA parameter or gate of another dtype than autocast's would be refused by the operator, so it
    follows too. fp64 is left alone, as everywhere under autocast.
    """
    dtype = torch.get_autocast_dtype(device_type)

    def cast(t: Tensor | None, eligible: tuple) -> Tensor | None:
        return t if t is None or t.dtype not in eligible else t.to(dtype)

    everything = (*HALVES, torch.float32)
    return (
        cast(x, everything),
        cast(weight, everything),
        cast(lora_a, HALVES),
        cast(lora_b, HALVES),
        cast(bias, everything),
        cast(gates, HALVES),
    )


def _kernel(device_type: str, key: torch._C.DispatchKey):
    def scatter_lora(
        x, weight, slots, offsets, top_k, lora_a=None, lora_b=None, scaling=1.0, bias=None, gates=None,
        x_grouped=False, y_grouped=False,
    ) -> Tensor:  # fmt: skip
        x, weight, lora_a, lora_b, bias, gates = follow(device_type, x, weight, lora_a, lora_b, bias, gates)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return torch.ops.moelora.scatter_lora(
                x, weight, slots, offsets, top_k, lora_a, lora_b, scaling, bias, gates, x_grouped, y_grouped
            )

    return scatter_lora


def register(lib: torch.library.Library) -> None:
    """Registers the autocast kernels of `scatter_lora` with `lib`."""
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        lib.impl("scatter_lora", _kernel(device_type, getattr(torch._C.DispatchKey, key)), key)
