"""LoRA on a model's experts, as the options ask for it."""

from __future__ import annotations

import re
import warnings

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from moelora.errors import MoeloraError, one_line
from moelora.experts import is_experts, projections


def adapt(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    which: str,
    target_modules: list[str],
    target_rank: int | None = None,
) -> PeftModel:
    """`model` with PEFT's LoRA on its experts (`which`: both, gate_up or down) and on `target_modules`.

    target_rank: that of the latter, with the same scaling; None: `rank`.
    """
    targets = set()
    for name, module in model.named_modules():
        if is_experts(module):
            first, second = projections(module)
            chosen = {"both": (first, second), "gate_up": (first,), "down": (second,)}[which]
            targets |= {f"{name.rpartition('.')[2]}.{projection}" for projection in chosen}
    own = [] if target_rank is None else [of_modules(name, targets) for name in target_modules]
    target_rank = target_rank or rank
    config = LoraConfig(
        task_type="CAUSAL_LM",
        rank_pattern=dict.fromkeys(own, target_rank),
        alpha_pattern=dict.fromkeys(own, alpha * target_rank / rank),
        r=rank,
        lora_alpha=alpha,
        target_modules=target_modules,
        target_parameters=sorted(targets),
    )
    kind = type(model).__name__
    layers = [name for name, _ in model.named_modules()]
    head = next((name for name, m in model.named_modules() if m is model.get_output_embeddings()), None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise MoeloraError(f"PEFT cannot adapt {kind}: {one_line(error)}") from None
    found = adapted.base_model.targeted_module_names
    if head in found:
        raise MoeloraError(
            f"--target-modules has {head}, the head of {kind}: the loss reads its weight, so that LoRA on it "
            "would never be trained; leave it out"
        )
    for name in target_modules:
        if _named(found, name):
            continue
        if _named(layers, name):
            raise MoeloraError(
                f"PEFT takes {name} for a projection of the experts of {kind}, so that no layer of that name "
                "would be trained: leave it out of --target-modules"
            )
        raise MoeloraError(f"--target-modules {name} names no layer of {kind}")
    return adapted


def _named(layers: list[str], name: str) -> bool:
    return any(layer == name or layer.endswith(f".{name}") for layer in layers)


def of_modules(name: str, targets: set[str]) -> str:
    """PEFT's pattern for the layers called `name`, which fits no parameter of experts called so, too."""
    modules = sorted(target.removesuffix(f".{name}") for target in targets if target.endswith(f".{name}"))
    return "".join(rf"(?<!\.{re.escape(module)}\.)" for module in modules) + name
