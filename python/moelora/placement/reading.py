"""Loading a placed model: of a dense checkpoint's experts, only those of this rank are ever read.

transformers builds the model without its experts' weights, which a quantiser may take out of its hands, and
loads the rest. The file's tensors are found by transformers' own map of names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moelora import standin
from moelora.errors import MoeloraError
from moelora.layouts import Files, Source
from moelora.placement.group import Group
from moelora.placement.owners import owners_of
from moelora.placement.spreading import told
from moelora.stacking import Names, Stack, complete, expert_stacks, order

METHOD = "moelora_own_experts"
SHARE: ContextVar[tuple[Group, str | Sequence[int]]] = ContextVar("share")  # for the load that is going on


@register_quantization_config(METHOD)
@dataclass
class OwnExpertsConfig(QuantizationConfigMixin):
    """There for the time of a load only."""

    quant_method: str = METHOD


@register_quantizer(METHOD)
class OwnExperts(HfQuantizer):
    """Leaves transformers everything but the experts' weights, and reads this rank's."""

    requires_calibration = True  # nothing is quantised here

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files or not str(checkpoint_files[0]).endswith(".safetensors"):
            raise MoeloraError(
                f"owners need safetensors, got {(checkpoint_files or ['no file'])[0]}: place the loaded model"
            )
        group, owners = SHARE.get()
        self._files = Files(checkpoint_files)
        self._found = located(model, self._files)
        self._parts = {}
        ignored = set()
        for name, stack in self._found.items():
            module = model.get_submodule(stack.module)
            whose = owners_of(owners, stack.size[0], group.size, stack.module)
            own = [expert for expert, rank in enumerate(whose) if rank == group.rank]
            shape, dtype = (
                tuple(module._parameters[stack.weight].shape),
                module._parameters[stack.weight].dtype,
            )
            self._parts[name] = (module, own, shape, dtype)
            module.register_parameter(stack.weight, None)  # transformers would allocate and load it
            module._is_hf_initialized = True
            ignored.add(rf"^{re.escape(stack.module)}\.")
        # Not unexpected, but ours.
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *ignored,
        }

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        group, _ = SHARE.get()
        for name, (module, own, shape, dtype) in self._parts.items():
            stack = self._found[name]
            weight = torch.empty(len(own), *shape[1:], dtype=dtype)
            for number, expert in enumerate(own):
                read(stack, expert, self._files, weight[number])
            device = next(model.parameters()).device
            standin.spread(module, stack.weight, weight.to(device), shape, dtype, told(name, group))
        self._files, self._found, self._parts = None, {}, {}
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


def located(model: nn.Module, files: Files) -> dict[str, Stack]:
    """Where the files have each experts' weight of a model on the meta device, by the parameter's name.

    Raises: MoeloraError for weights that the files lack, or that are built otherwise than by stacking.
    """
    found = expert_stacks(model)
    names = Names(model, model.state_dict())
    places: dict[str, dict[tuple[int, int], Source]] = {}
    for tensor in files.names:
        target, converter, at = names.of(tensor)
        if target not in found:
            continue
        source = Source(tensor, {"weight": tensor})
        if converter is None:
            found[target].sources, found[target].stacked = [[source]], True
        else:
            number = int(next(part for part in reversed(tensor.split(".")) if part.isdecimal()))
            places.setdefault(target, {})[number, order(target, converter, at, source)] = source
    for target, several in places.items():
        found[target].sources = complete(found[target], several)
    for name, stack in found.items():
        if not stack.sources:
            raise MoeloraError(f"{name} is not in the files")
    return found


def read(stack: Stack, expert: int, files: Files, out: Tensor) -> None:
    """Copy one expert's weight, out of a stacked tensor or the matrices that it has in the files."""
    if stack.stacked:
        parts = [files.part(stack.sources[0][0].name, expert)]
    else:
        parts = [files[source.name] for source in stack.sources[expert]]
    sizes = [tuple(part.shape) for part in parts]
    if sum(size[0] for size in sizes) != out.shape[0] or any(size[1:] != out.shape[1:] for size in sizes):
        raise MoeloraError(
            f"{stack.name}, expert {expert}, is {sizes} in the files, expected {tuple(out.shape)}"
        )
    for part, rows in zip(parts, out.split([size[0] for size in sizes]), strict=True):
        rows.copy_(part)
