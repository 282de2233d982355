"""IMPLEMENTATIONS: operator name → function with the schema's arguments, for `backends.py`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import backward, dab, dx, forward, glu, route


def _on_its_device(function: Callable) -> Callable:
    """Launches go to the current device's current stream: the first argument's device becomes current."""

    @functools.wraps(function)
    def implementation(lead: Tensor, *args):
        with torch.cuda.device(lead.device) if lead.is_cuda else contextlib.nullcontext():
            return function(lead, *args)

    return implementation


IMPLEMENTATIONS: dict[str, Callable] = {
    function.__name__: _on_its_device(function)
    for function in (
        route.flatten_sort_count,
        forward.scatter_lora,
        dx.scatter_lora_dx,
        dab.scatter_lora_dab,
        backward.scatter_lora_backward,
        dab.scatter_lora_dw,
        dab.scatter_lora_dbias,
        glu.glu,
        glu.glu_backward,
    )
}
