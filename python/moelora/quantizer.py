"""The quantiser by which transformers loads packed checkpoints: ours, and what `moelora.from_pretrained` says
of others.

transformers loads what is dense, and dequantises what the operators cannot run packed. The packed weights of
experts and of linear layers are taken out of its hands: the model is built without them, and they are mapped
from their files when the rest is there. Importing this is what registers it; it imports nothing that imports
transformers' models.
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
    from moelora.layouts import Files, Layout, Source
    from moelora.stacking import Plan


@register_quantization_config(METHOD)
@dataclass
class MoeloraConfig(QuantizationConfigMixin):
    """ "quantization_config" of our own layout (`moelora.packed_layout`).

    source: that of another project's checkpoint, whose tensors the files have. cache_dir: where its experts
    are stacked. key_mapping: transformers' argument. left_out: a pattern of the names of tensors that are
    no weights of the model. None of them is saved.
    """

    def __init__(
        self,
        version: int = VERSION,
        experts: dict | None = None,
        linears: dict | None = None,
        others: dict | None = None,
        source: dict | None = None,
        cache_dir: str | None = None,
        key_mapping: dict[str, str] | None = None,
        left_out: str = "",
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.version, self.experts, self.linears, self.others = version, experts, linears, others
        self.source, self.cache_dir = source, cache_dir
        self.key_mapping, self.left_out = key_mapping, left_out

    def to_dict(self) -> dict[str, Any]:
        named = ("quant_method", "version", "experts", "linears", "others")
        found = {name: getattr(self, name) for name in named}
        return found if self.others else {name: value for name, value in found.items() if name != "others"}

    @property
    def settings(self) -> dict[str, Any]:
        """What describes the files."""
        return self.source or self.to_dict()


@register_quantizer(METHOD)
class MoeloraQuantizer(HfQuantizer):
    """Keeps experts packed, and frozen linear layers."""

    requires_calibration = True  # nothing is quantised here
    quantization_config: MoeloraConfig

    def __init__(self, quantization_config: MoeloraConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._devices: dict[str, torch.device] = {}  # by names of modules, "" for all
        self._experts: dict[str, tuple[nn.Module, str, PackedWeight]] = {}
        self._linears: dict[str, tuple[nn.Module, str, PackedWeight]] = {}
        self._dequantised: dict[str, Source] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if device_map is None:
            return
        several = device_map if isinstance(device_map, dict) else {"": device_map}
        try:
            self._devices = {name: torch.device(device) for name, device in several.items()}
        except (TypeError, RuntimeError):
            raise MoeloraError(
                "device_map must be a device, or a device for each module, where experts are packed, "
                f"got {device_map!r}"
            ) from None

    def _device_of(self, name: str) -> torch.device:
        """Where a parameter is to be: by the longest name of a module that has it."""
        there = [where for where in self._devices if not where or name.startswith(f"{where}.")]
        return self._devices[max(there, key=len)] if there else torch.device("cpu")

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from moelora import layouts, stacking, unpacking

        settings = self.quantization_config.settings
        layout = layouts.recognise(settings)
        if not checkpoint_files or not str(checkpoint_files[0]).endswith(".safetensors"):
            raise MoeloraError(
                f"packed weights are read from safetensors, got {(checkpoint_files or ['none'])[0]}"
            )
        files = layouts.Files(checkpoint_files)
        plan = stacking.plan(model, files, layout, self.quantization_config.key_mapping)
        with torch.device("cpu"):  # and not the default of now, which is where the model is: on meta
            self._experts = self._stacked(model, plan, files, layout)
            self._linears, self._dequantised = unpacking.linears(model, plan.linears, files, layout, settings)
        self._layout = layout
        own = {self.quantization_config.left_out} - {""}
        for name, (module, weight, _) in self._kept.items():
            module.register_parameter(weight, None)  # transformers would allocate and draw it
            module._is_hf_initialized = True
            own.add(rf"^{re.escape(name.rpartition('.')[0])}\.")
        # Not unexpected, but ours.
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *own}

    @property
    def _kept(self) -> dict[str, tuple[nn.Module, str, PackedWeight]]:
        """(module, name of its parameter, weight) of all that stays packed, by the parameter's full name."""
        return self._experts | self._linears

    def _stacked(self, model: nn.Module, plan: Plan, files: Files, layout: Layout) -> dict[str, tuple]:
        """The experts' part of `_kept`, all mapped."""
        from moelora import cache, stacking

        settings, directory = self.quantization_config.settings, self.quantization_config.cache_dir
        apart = [stack for stack in plan.stacks if not stack.stacked]
        found = cache.stacked(apart, files, layout, settings, directory) if apart else {}
        for stack in plan.stacks:
            if stack.stacked:
                found[stack.name] = stacking.matrix(stack, 0, files, layout, settings)
        return {
            stack.name: (model.get_submodule(stack.module), stack.weight, found[stack.name])
            for stack in plan.stacks
        }

    def get_weight_conversions(self) -> list:
        return []

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        from moelora.unpacking import converters

        return converters(self, self._layout, self._dequantised) + weight_conversions

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from moelora import experts, standin
        from moelora.linears import PackedLinear
        from moelora.unpacking import told

        targets = {name for _, name, _ in self._experts.values()}
        # What would undo the stacking of dense experts when the model is saved, and the dequantising.
        model._weight_conversions = [
            entry
            for entry in getattr(model, "_weight_conversions", None) or []
            if not any(target.endswith(end) for target in entry.target_patterns for end in targets)
            and not getattr(entry, "operations", [None])[0].__class__.__module__.startswith("moelora.")
        ]
        for name, (module, weight_name, weight) in self._kept.items():
            weight = weight.to(self._device_of(name))
            if name in self._linears:
                standin.install(module, weight_name, weight, model.config.dtype, name, matrix=True)
                module.__class__ = PackedLinear
            else:
                weight = weight.turned() if module.is_transposed else weight
                standin.install(module, weight_name, weight, model.config.dtype, name)
                experts.choose(module)
        told(model, self._dequantised, self._layout)
        self._describe()
        self._experts, self._linears, self._dequantised = {}, {}, {}
        return model

    def _describe(self) -> None:
        """The section of a config.json of our own layout, which the model is saved in."""
        from moelora.packed_layout import Layout
        from moelora.unpacking import described

        config, found, others = self.quantization_config, {}, {}
        for field, kept in (("experts", self._experts), ("linears", self._linears)):
            found[field], apart = described({name: weight for name, (_, _, weight) in kept.items()})
            others |= apart
        section = Layout(**found, others=others).section()
        config.source, config.version = None, section["version"]
        config.experts, config.linears, config.others = (*map(section.get, found), section.get("others"))

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        """Our own layout, whatever the model was loaded from."""
        from moelora import packed_layout, standin

        state = model.state_dict()
        kept = list(standin.installed(model))
        _refuse_parts(kept)
        for where, _, name, packed in kept:
            for part in packed_layout.PARTS:
                state.pop(f"{where}.{name}{standin.BESIDE}.{part}", None)
            state.pop(f"{where}.{name}", None)
            weight = packed.weight.turned() if packed.transposed else packed.weight
            state |= packed_layout.tensors(f"{where}.{name}", weight)
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from moelora import standin
        from moelora.linears import PackedLinear

        _refuse_parts(standin.installed(model))
        for _, module, name, packed in standin.installed(model):
            weight = packed.weight.dequantize(dtype).contiguous()
            if isinstance(module, PackedLinear):
                module.__class__, weight = nn.Linear, weight[0]
            standin.uninstall(module, name, weight)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _refuse_parts(kept: Any) -> None:
    for where, _, name, packed in kept:
        if not packed.whole:
            raise MoeloraError(
                f"{where}.{name} is spread over ranks: a model is whole before moelora.place only"
            )
