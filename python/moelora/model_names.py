"""What the tensors of a model are called in memory and in its checkpoints, by transformers' own conversions.

On disk many models have a matrix for each expert, in memory all experts of a layer in one parameter; others
are called differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from moelora import configurations
from moelora.errors import MoeloraError, one_line
from moelora.experts import is_experts, outside, projections
from moelora.packed_layout import SECTION


def outline(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration, of the class that it names if it does, without storage.

    Raises: MoeloraError if it cannot be built, or has no experts.
    """
    named = next(iter(config.architectures or ()), None)
    cls = getattr(transformers, named, None) if named else None
    try:
        with torch.device("meta"):
            dtype = config.dtype or torch.float32
            model = cls._from_config(config, dtype=dtype) if cls else _causal(config, dtype)
    except Exception as error:  # configurations can be wrong in any way
        raise MoeloraError(f"cannot build a {named or config.model_type} model: {one_line(error)}") from None
    if not any(is_experts(module) for module in model.modules()):
        raise MoeloraError(
            f"{type(model).__name__} has no expert layers: expected a mixture-of-experts model that follows "
            f"transformers' experts interface{outside(model)}"
        )
    return model


def _causal(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def configuration(directory: Path) -> PreTrainedConfig:
    """Raises: MoeloraError if there is none that can be read."""
    if not (directory / "config.json").is_file():
        raise MoeloraError(f"{directory} is not a transformers checkpoint: expected a config.json in it")
    try:
        found = configurations.read(directory, local_files_only=True)
    except Exception as error:  # as above
        raise MoeloraError(f"cannot read the configuration in {directory}: {one_line(error)}") from None
    if found.prefix and not getattr(found.config, SECTION, None):
        raise MoeloraError(
            f"{directory} has a language model inside another one: "
            "moelora.from_pretrained(DIR).save_pretrained(OUT) writes it alone"
        )
    return found.config


class Names:
    """Names of a model's tensors, in memory ("model") and in a dense checkpoint ("disk")."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._by_pattern = {p: entry for entry in self._converters for p in entry.source_patterns}
        self.state = model.state_dict()
        # For the way back, which looks for them through all modules at each call.
        kept = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [entry for entry in kept if not isinstance(entry, PrefixChange)]

    def model_name(self, disk: str) -> tuple[str, str | None]:
        """The model's name for a tensor on disk, and the pattern of the conversion that makes it, if any.

        Several tensors on disk may go into one.
        """
        prefix = self.model.base_model_prefix
        return rename_source_key(disk, self._renamings, self._converters, prefix, self.state)

    def convert(self, name: str, tensors: dict[str, list[Tensor]]) -> Tensor:
        """The model's tensor `name`, or some of its experts, from those on disk by their patterns."""
        converter = deepcopy(self._by_pattern[next(iter(tensors))])
        for pattern, values in tensors.items():
            for value in values:
                converter.add_tensor(name, name, pattern, value)
        found = converter.convert(name, model=self.model, config=self.model.config)
        value = found[name]
        return value[0] if isinstance(value, list) else value

    def on_disk(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the model as its dense checkpoint has them, by their names there."""
        return revert_weight_conversion(self.model, tensors)

    def own(self) -> dict[str, Tensor]:
        """The model's parameters and stored buffers, without storage; what is tied is there once."""
        seen: set[int] = set()
        found = {}
        tied = {id(t): name for name, t in self.model.named_parameters()}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if tied.get(id(tensor), name) == name and id(tensor) not in seen:
                found[name] = tensor
                seen.add(id(tensor))
        return found

    def experts(self) -> dict[str, nn.Module]:
        """The name of each weight of experts → its module."""
        return {
            f"{name}.{projection}": module
            for name, module in self.model.named_modules()
            if is_experts(module)
            for projection in projections(module)
        }

    def linears(self) -> Iterator[str]:
        """The names of the linear layers' weights in the layers that have experts, and in their neighbours:
        without routers, gates of shared experts, head and what is no part of the decoder.
        """
        roots = {name.split(".layers.")[0] + ".layers." for name in self.experts() if ".layers." in name}
        for name, module in self.model.named_modules():
            last = name.rpartition(".")[2]
            inside = any(name.startswith(root) for root in roots)
            if inside and type(module) is nn.Linear and not last.endswith(("gate", "router")):
                yield f"{name}.weight"


def oriented(module: nn.Module, weight: Any) -> Any:
    """A parameter of an experts module as [E, out, in]."""
    return weight.transpose(1, 2) if module.is_transposed else weight
