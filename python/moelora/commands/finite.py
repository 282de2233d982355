"""Numbers that are not finite, told apart: the base's weights, the data, the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moelora.errors import MoeloraError
from moelora.standin import Packed, StandIn

E8M0 = torch.float8_e8m0fnu
# Floats of a byte → what tells a NaN of theirs: (mask, bits). They have no infinities.
_NANS = {torch.float8_e4m3fn: (0x7F, 0x7F), E8M0: (0xFF, 0xFF)}
PIECE = 1 << 15  # elements: torch's grain of parallel work


def whole(tensor: Tensor) -> bool:
    """Whether every element is finite. A sum settles it in one pass unless it overflows itself."""
    if tensor.dtype in _NANS:
        return not bool(_byte_nans(tensor).any())
    return tensor.numel() == 0 or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _byte_nans(tensor: Tensor) -> Tensor:
    mask, bits = _NANS[tensor.dtype]
    return tensor.view(torch.uint8).bitwise_and(mask) == bits


def weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor) of the parameters and buffers of a base that are to be finite.

    Of packed weights these are the scales and, in fp8, the codes: both are buffers.
    """
    exponents = {
        f"{name}.scale"
        for name, module in model.named_modules()
        if isinstance(module, Packed) and module.format == "mxfp4"
    }
    named = [*model.named_parameters(), *model.named_buffers()]
    found = [
        (name, tensor.detach().view(E8M0) if name in exponents else tensor.detach())
        for name, tensor in named
        if not isinstance(tensor, StandIn) and not tensor.is_meta
    ]
    return [
        (name, t) for name, t in found if t.is_floating_point() and (t.element_size() > 1 or t.dtype in _NANS)
    ]


def check_weight(name: str, tensor: Tensor, where: object, over: Callable[[], bool] = bool) -> None:
    """Looks at a tensor in pieces which torch does on one thread, until `over` says that it need not.

    Raises: MoeloraError naming the tensor, with how many of its elements are NaN or Inf.
    """
    for piece in (tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)).split(PIECE):
        if over():
            return
        if not whole(piece):
            raise MoeloraError(f"the weights in {where} are not finite: {name} has {_counts(tensor)}")


def _counts(tensor: Tensor) -> str:
    if tensor.dtype in _NANS:
        nans, infs = int(_byte_nans(tensor).sum()), 0
    else:
        nans, infs = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    found = [f"{count} {what}" for count, what in ((nans, "NaN"), (infs, "Inf")) if count]
    return f"{' and '.join(found)} among {tensor.numel():,} elements"


def trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter) of what is trained."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def check_adapter(model: nn.Module, step: int, rate: float | None = None) -> None:
    """Raises: MoeloraError naming the first trained parameter that is not finite after `step` steps."""
    for name, parameter in trainable(model):
        if not whole(parameter.detach()):
            at = "" if rate is None else f", at a rate of {rate:.3g}"
            raise MoeloraError(
                f"{name} has {_counts(parameter.detach())} after step {step}{at}: lower --learning-rate"
            )


def check_held_out(loss: float, step: int, model: nn.Module) -> None:
    """Raises: MoeloraError if the held-out loss is not finite, with what is to blame for it."""
    if math.isfinite(loss):
        return
    if step:
        check_adapter(model, step)
        raise MoeloraError(f"the held-out loss is {loss} after step {step}: {_overflow(model)}")
    raise MoeloraError(
        f"the held-out loss is {loss} before anything was trained, from finite weights: "
        f"{_overflow(model)}, or the held-out data have no token to learn"
    )


def check_loss(loss: Tensor, model: nn.Module, inputs: dict[str, Any], step: int) -> None:
    """Looks at the loss of a forward pass in optimizer step `step` (from 1).

    Raises: MoeloraError if it is not finite: data without a token to learn, a base that overflows on these
        data, or an adapter that training drove too far, each with its own advice.
    """
    if bool(loss.isfinite()):
        return
    value, labels = loss.item(), inputs.get("labels")
    if isinstance(labels, Tensor) and bool((labels == -100).all()):
        raise MoeloraError(f"the loss is {value} at step {step}: its data have no token to learn")
    check_adapter(model, step - 1)
    if step == 1:
        raise MoeloraError(
            f"the loss is {value} at step 1, before anything was trained, from finite weights: "
            f"{_overflow(model)}"
        )
    raise MoeloraError(
        f"the loss is {value} at step {step}, with a finite adapter: {_overflow(model)}, or lower "
        "--learning-rate"
    )


def check_logits(logits: Tensor, model: nn.Module, when: str) -> None:
    """Looks at a model's own logits [..., V], which its dtype may not hold where those of the loss are wider.

    Raises: MoeloraError if they are not finite, saying `when`.
    """
    if not whole(logits):
        raise MoeloraError(
            f"the logits have {_counts(logits)} {when}, from finite weights: {_overflow(model)}"
        )


def check_gradients(model: nn.Module, step: int) -> None:
    """Raises: MoeloraError naming the first gradient of optimizer step `step` that is not finite."""
    graded = [(name, p.grad) for name, p in trainable(model) if p.grad is not None]
    if not graded:
        return
    # One answer for all of them: a question each would wait for the device as often.
    home = graded[0][1].device
    if bool(torch.stack([grad.sum(dtype=torch.float32).to(home) for _, grad in graded]).isfinite().all()):
        return
    for name, grad in graded:
        if not whole(grad):
            refuse_gradient(name, grad, step, model)


def refuse_gradient(name: str, gradient: Tensor, step: int, model: nn.Module) -> NoReturn:
    """Raises: MoeloraError that names a gradient which is not finite."""
    raise MoeloraError(
        f"the gradient of {name} has {_counts(gradient)} at step {step}, of a finite loss: "
        f"{_overflow(model)}, or lower --learning-rate"
    )


def _overflow(model: nn.Module) -> str:
    dtype = str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
    if dtype == "float16":
        return "float16 ends at 65504, take --dtype bfloat16 or float32"
    return f"the model overflows {dtype} on these data"
