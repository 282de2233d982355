"""The proof at a run's end: the adapter as it is on disk, on the base as it is on disk, by plain PEFT.

Packed experts run on the operators there, too: nothing else computes with them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

import moelora
from moelora.commands import finite, heap
from moelora.errors import MoeloraError
from moelora.standin import StandIn, installed

# Relative difference of logits, by the base's dtype: PEFT rounds W + scaling·B·A to it, the operators do not.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def reload(
    model: PeftModel, adapter: Path, base: Callable[[], PreTrainedModel], rows: Tensor
) -> float | None:
    """Relative difference of the logits on `rows` [n, length] between `model` and `base()` with `adapter` in
    plain PEFT; None if no logit of the base is other than 0.

    The median over tokens: in half precision, rounding sends a few tokens to other experts. The weights of
    `model` are let go first, so that a large base is not in memory twice; `model` is used up.

    Raises: MoeloraError if the logits are not finite or differ by more than rounding, or if the adapter's
        tensors differ at all.
    """
    model.eval()
    rows = rows.to(model.device)
    with torch.no_grad():
        tuned = model(input_ids=rows).logits
    finite.check_logits(tuned, model, "with the adapter")
    tensors = {name: (t.dtype, _digest(t)) for name, t in get_peft_model_state_dict(model).items()}
    moelora.disable(model)
    for parameter in model.parameters():
        if not isinstance(parameter, StandIn):  # what is packed is in its files
            parameter.data = parameter.data.new_empty(0)
    heap.trim()
    plain = PeftModel.from_pretrained(base(), adapter).to(rows.device).eval()
    if any(installed(plain)):
        moelora.enable(plain)
    else:
        plain.get_base_model().set_experts_implementation("eager")  # runs whatever the sizes and the dtype
    for name, tensor in get_peft_model_state_dict(plain).items():
        dtype, digest = tensors.pop(name, (tensor.dtype, None))
        if digest != _digest(tensor.to(dtype)):
            raise MoeloraError(f"{adapter} reloaded with plain PEFT has another {name} than the one trained")
    if tensors:
        raise MoeloraError(f"{adapter} reloaded with plain PEFT lacks {next(iter(tensors))}")
    with torch.no_grad():
        reloaded = plain(input_ids=rows).logits.double()
    difference, allowed = relative(tuned.double(), reloaded), TOLERANCE[plain.dtype]
    if difference is not None and not difference <= allowed:
        raise MoeloraError(
            f"{adapter} reloaded with plain PEFT gives other logits: relative difference {difference:.1e}, "
            f"expected at most {allowed:.0e}"
        )
    return difference


def _digest(tensor: Tensor) -> bytes:
    """Of its bytes: a copy of an adapter would be as large as the adapter."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy()).digest()


def relative(found: Tensor, expected: Tensor) -> float | None:
    """Median over tokens of ‖found − expected‖ / ‖expected‖, both [..., V], where ‖expected‖ is not 0.

    A token that should have zeros and has others makes it infinite; None if all are zeros.
    """
    sizes = expected.norm(dim=-1)
    zero = sizes == 0
    if bool((found[zero] != 0).any()):
        return float("inf")
    if bool(zero.all()):
        return None
    return ((found - expected).norm(dim=-1)[~zero] / sizes[~zero]).median().item()
