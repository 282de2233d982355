"""The optimizer of a run: its memory, and stepping inside the backward."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moelora.commands import finite
from moelora.errors import MoeloraError

# What Trainer calls them. bitsandbytes has a kernel of the 8-bit one for CPUs.
NAMES = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_8bit"}
# Bytes of a parameter's two moments. An 8-bit one has a float32 scale for each block of 256.
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256)}


def check(name: str) -> None:
    """Raises: MoeloraError where the optimizer's library is missing."""
    if name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise MoeloraError(
            "--optimizer adamw_8bit is bitsandbytes', which is missing: pip install bitsandbytes"
        )


def step_in_backward(
    optimizer: torch.optim.Optimizer, model: nn.Module, step: Callable[[], int]
) -> list[RemovableHandle]:
    """Lets `optimizer` take its step for each parameter when its gradient is there, and drop the gradient.

    So the gradients of a few parameters exist at a time. An optimizer leaves parameters without gradients as
    they are, so a step for one is its usual step. What Trainer does after the backward finds none.

    Args:
        model: whose trained parameters they are.
        step: the number of the present step, for what is told of gradients that are not finite.
    """

    def take(name: str, parameter: Tensor) -> None:
        if not finite.whole(parameter.grad):
            finite.refuse_gradient(name, parameter.grad, step(), model)
        optimizer.step()
        parameter.grad = None

    return [
        parameter.register_post_accumulate_grad_hook(partial(take, name))
        for name, parameter in finite.trainable(model)
    ]
