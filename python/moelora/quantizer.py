"""The quantiser by which transformers loads packed checkpoints: ours, and what `moelora.from_pretrained` says
of others.

transformers loads what is dense, and dequantises packed linear layers on the way. The experts' packed
weights are taken out of its hands: the model is built without them, and they are mapped from their files when
the rest is there. Importing this is what registers it; it imports nothing that imports transformers' models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moelora.errors import MoeloraError
from moelora.packed_layout import METHOD, VERSION
from torch_moelora.formats import PackedWeight

if TYPE_CHECKING:
    from moelora.layouts import Files, Source
    from moelora.stacking import Plan


@register_quantization_config(METHOD)
@dataclass
class MoeloraConfig(QuantizationConfigMixin):
    """ "quantization_config" of our own layout (`moelora.packed_layout`).

    source: that of another project's checkpoint, whose tensors the files have. cache_dir: where its experts
    are stacked. Neither is saved.
    """

    def __init__(
        self,
        version: int = VERSION,
        experts: dict | None = None,
        linears: dict | None = None,
        source: dict | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.version, self.experts, self.linears = version, experts, linears
        self.source, self.cache_dir = source, cache_dir

    def to_dict(self) -> dict[str, Any]:
        named = ("quant_method", "version", "experts", "linears")
        return {name: getattr(self, name) for name in named}

    @property
    def settings(self) -> dict[str, Any]:
        """What describes the files."""
        return self.source or self.to_dict()


def dequantised(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight [N, K] of a packed [1, N, K]."""
    return weight.dequantize(dtype)[0]


@register_quantizer(METHOD)
class MoeloraQuantizer(HfQuantizer):
    """Keeps experts packed."""

    requires_calibration = True  # nothing is quantised here
    quantization_config: MoeloraConfig

    def __init__(self, quantization_config: MoeloraConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.device = torch.device("cpu")
        self._packed: dict[str, tuple[str, str, PackedWeight]] = {}
        self._linears: dict[str, Source] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict):
            devices = set(device_map.values())
            device_map = devices.pop() if len(devices) == 1 else device_map
        if device_map is None:
            return
        try:
            self.device = torch.device(device_map)
        except (TypeError, RuntimeError):
            raise MoeloraError(
                f"device_map must be one device for packed experts, got {device_map!r}"
            ) from None

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from moelora import layouts, stacking

        settings = self.quantization_config.settings
        layout = layouts.recognise(settings)
        if not checkpoint_files or not str(checkpoint_files[0]).endswith(".safetensors"):
            raise MoeloraError(
                f"packed weights are read from safetensors, got {(checkpoint_files or ['none'])[0]}"
            )
        files = layouts.Files(checkpoint_files)
        plan = stacking.plan(model, files, layout)
        self._layout, self._linears = layout, plan.linears
        with torch.device("cpu"):  # and not the default of now, which is where the model is: on meta
            self._packed = self._weights(plan, files, settings)
        for where, name, _ in self._packed.values():
            module = model.get_submodule(where)
            module.register_parameter(name, None)  # transformers would allocate and draw it
            module._is_hf_initialized = True
        # Not unexpected, but ours.
        own = {rf"^{re.escape(where)}\." for where, _, _ in self._packed.values()}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *own}

    def _weights(self, plan: Plan, files: Files, settings: dict) -> dict[str, tuple[str, str, PackedWeight]]:
        """(module, parameter, weight) of each experts' weight, all mapped."""
        from moelora import cache, stacking

        apart = [stack for stack in plan.stacks if not stack.stacked]
        found = {
            stack.name: stacking.matrix(stack, 0, files, self._layout, settings)
            for stack in plan.stacks
            if stack.stacked
        }
        if apart:
            found |= cache.stacked(apart, files, self._layout, settings, self.quantization_config.cache_dir)
        return {stack.name: (stack.module, stack.weight, found[stack.name]) for stack in plan.stacks}

    def get_weight_conversions(self) -> list:
        return []

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        from moelora.unpacking import converters

        return converters(self, self._layout, self._linears) + weight_conversions

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from moelora import experts, standin
        from moelora.unpacking import told

        targets = {name.rpartition(".")[2] for name in self._packed}
        # What would undo the stacking of dense experts when the model is saved, and the dequantising.
        model._weight_conversions = [
            entry
            for entry in getattr(model, "_weight_conversions", None) or []
            if not any(target.endswith(end) for target in entry.target_patterns for end in targets)
            and not getattr(entry, "operations", [None])[0].__class__.__module__.startswith("moelora.")
        ]
        for name, (where, weight_name, weight) in self._packed.items():
            module = model.get_submodule(where)
            weight = weight.turned() if module.is_transposed else weight
            standin.install(module, weight_name, weight.to(self.device), model.config.dtype, name)
            experts.choose(module)
        told(model, self._linears, self._layout)
        self._describe()
        self._packed, self._linears = {}, {}
        return model

    def _describe(self) -> None:
        """The section of a config.json of our own layout, which the model is saved in."""
        from moelora.packed_layout import Layout
        from moelora.unpacking import choice

        weights = [weight for _, _, weight in self._packed.values()]
        self.quantization_config.source = None
        self.quantization_config.experts = self.quantization_config.linears = None
        if len({weight.format for weight in weights}) == 1:
            self.quantization_config.experts = Layout(choice(weights[0])).section()["experts"]

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        """Our own layout, whatever the model was loaded from; linear layers dense, as they are in memory."""
        from moelora import packed_layout, standin

        state = model.state_dict()
        kept = list(standin.installed(model))
        if kept and self.quantization_config.experts is None:
            raise MoeloraError(
                "the model's experts are packed in several formats, which one checkpoint cannot have"
            )
        for where, _, name, packed in kept:
            for part in packed_layout.PARTS:
                state.pop(f"{where}.{name}{standin.BESIDE}.{part}", None)
            state.pop(f"{where}.{name}", None)
            weight = packed.weight.turned() if packed.transposed else packed.weight
            state |= packed_layout.tensors(f"{where}.{name}", weight)
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from moelora import standin

        for _, module, name, packed in standin.installed(model):
            standin.uninstall(module, name, packed.weight.dequantize(dtype).contiguous())
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
