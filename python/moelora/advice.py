"""What an adapter's configuration asks for and PEFT does not do on stacked experts, and what would do it.

PEFT has one way to reach a 3-D parameter, `target_parameters`. It ignores what limits `target_modules`
(`layers_to_transform`, `exclude_modules`), and of the adapters that were trained when each expert was linear
layers of its own, it converts those of some families only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from moelora.experts import is_experts, projections

_LIMITS = ("layers_to_transform", "exclude_modules")


def configurations(model: nn.Module) -> dict[str, PeftConfig]:
    """PEFT's configurations of a model's adapters, by adapter; none if it has no adapters."""
    found = (vars(module).get("peft_config") for module in model.modules())
    return next((configs for configs in found if isinstance(configs, dict)), {})


def notes(model: nn.Module, adapted: dict[str, list[str]]) -> Iterator[str]:
    """A sentence for each thing that an adapter's configuration asks for in vain.

    `adapted`: adapter → the names of the experts' parameters that it is on, as the base model has them.
    """
    for adapter, config in configurations(model).items():
        names = adapted.get(adapter, [])
        limits = {limit: getattr(config, limit, None) for limit in _LIMITS}
        told = " and ".join(
            f"{name}={value!r}" for name, value in limits.items() if value not in (None, [], ())
        )
        meant = [name for name in names if _meant(config, name)]
        if told and len(meant) < len(names):
            yield (
                f"PEFT ignores {told} of {adapter} for target_parameters: its LoRA is on {len(names)} "
                f"parameters of experts, not on {len(meant)}. {_instead(meant)}"
            )
        base = _transformers_model(model)
        if not names and base is not None:
            yield from _unreached(adapter, config, base)


def _meant(config: PeftConfig, parameter: str) -> bool:
    """Whether PEFT would adapt a parameter if its limits held for parameters, by its own reading of them."""
    module = parameter.rpartition(".")[0]
    asked = {"layers_pattern": getattr(config, "layers_pattern", None), "modules_to_save": None}
    asked |= {limit: getattr(config, limit, None) for limit in _LIMITS} | {"target_parameters": None}
    return all(
        check_target_module_exists(SimpleNamespace(**asked, target_modules=[name.rpartition(".")[2]]), name)
        for name in (module, parameter)
    )


def _instead(parameters: list[str]) -> str:
    """The `target_parameters` that name these, as an expression."""
    if not parameters:
        return "Leave the experts out of target_parameters"
    layers: dict[str, list[int]] = {}
    for name in parameters:
        head, number, tail = re.match(r"(.*?)(\d+|$)(.*)", name).groups()
        layers.setdefault(f"{head}{{i}}{tail}" if number else name, []).append(int(number or 0))
    terms = [
        f'[f"{name}" for i in {_numbers(numbers)}]' if "{i}" in name else f'["{name}"]'
        for name, numbers in layers.items()
    ]
    return f"target_parameters={' + '.join(terms)} would do it"


def _numbers(numbers: list[int]) -> str:
    """As a range if they are one."""
    first, last = min(numbers), max(numbers)
    dense = len(numbers) > 2 and sorted(numbers) == list(range(first, last + 1))
    return f"range({first}, {last + 1})" if dense else str(tuple(sorted(numbers)))


def _transformers_model(model: nn.Module) -> PreTrainedModel | None:
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def _unreached(adapter: str, config: PeftConfig, model: PreTrainedModel) -> Iterator[str]:
    """Of an adapter that is on no experts though it names what they were as linear layers."""
    asked = () if isinstance(config.target_modules, str) else config.target_modules or ()
    parts = per_expert_names(model)
    ends = {name.rpartition(".")[2] for name in asked if "shared" not in name}
    named = [part for part in parts if part in ends]
    if named:
        stacked = ", ".join(f'"experts.{name}"' for name in dict.fromkeys(parts.values()))
        told = unconverted(model)
        yield (
            f"target_modules of {adapter} ({', '.join(named)}) reaches no experts: here they are stacked "
            f"parameters. target_parameters=[{stacked}] trains them" + (f"; {told}" if told else "")
        )


def per_expert_names(model: PreTrainedModel) -> dict[str, str]:
    """What an expert's linear layers are called in checkpoints → the stacked parameter that has them here."""
    known = {name for module in model.modules() if is_experts(module) for name in projections(module)}
    found = {}
    for conversion in get_model_conversion_mapping(model):
        target = conversion.target_patterns[0].rpartition(".")[2]
        if target in known and "experts" in conversion.target_patterns[0]:
            for source in conversion.source_patterns:
                found[source.removesuffix(".weight").removesuffix("$").rpartition(".")[2]] = target
    return found


def unconverted(model: PreTrainedModel) -> str | None:
    """Why PEFT does not load adapters of single experts into this model, and what does; None if it does.

    Such adapters were trained when each expert was linear layers of its own (transformers 4).
    """
    parts = per_expert_names(model)
    if not parts:
        return None
    config = LoraConfig(target_modules=list(parts))
    convert_peft_config_for_transformers(config, model, None)
    if config.target_parameters:
        return None
    text = f"PEFT does not convert adapters of single experts for {model.config.model_type}: "
    if {"gate_up_proj", "down_proj"} != set(parts.values()):
        return text + "merge them into the base with the transformers 4 that trained them, or train anew"
    parameters = [f"experts.{name}" for name in dict.fromkeys(parts.values())]
    return text + (
        "PeftModel.from_pretrained(model, adapter, config=config) loads them, where config is the adapter's "
        f"with target_modules without the experts' {', '.join(parts)}, target_parameters={parameters}, "
        "and in rank_pattern and alpha_pattern twice its r and its lora_alpha for '.*\\.gate_up_proj'"
    )
