"""IMPLEMENTATIONS: operator name → function with the schema's arguments, for `backends.py`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch

from ..calls import CALLS
from . import backward, dab, dx, forward, glu, route
from .interpreted import refuse_bf16


def _takes_arguments(function: Callable) -> Callable:
    """Launches go to the current device's current stream: the first argument's device becomes current."""
    kind = CALLS[function.__name__]

    @functools.wraps(function)
    def implementation(*args):
        call = kind(*args)
        refuse_bf16(function.__name__, call)
        with torch.cuda.device(call[0].device) if call[0].is_cuda else contextlib.nullcontext():
            return function(call)

    return implementation


IMPLEMENTATIONS: dict[str, Callable] = {
    function.__name__: _takes_arguments(function)
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
