"""Tiny transformers models whose sizes all differ, and what the model tests do with them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PreTrainedModel, Qwen3MoeConfig

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = {
    # [E, out, in], no biases, silu
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_COMMON, intermediate_size=40, moe_intermediate_size=20, num_experts=5, norm_topk_prob=True
    ),
    # sizes that two processes can share
    "qwen3_moe_ep": lambda: Qwen3MoeConfig(
        **_COMMON | {"num_key_value_heads": 2}, intermediate_size=40, moe_intermediate_size=20, num_experts=6
    ),
    # [E, in, out], biases, interleaved and clamped gate
    "gpt_oss": lambda: GptOssConfig(**_COMMON, intermediate_size=20, num_local_experts=5),
    # another activation
    "mixtral_gelu": lambda: MixtralConfig(
        **_COMMON, intermediate_size=20, num_local_experts=5, hidden_act="gelu"
    ),
    # an activation that the operators do not fuse
    "mixtral_tanh": lambda: MixtralConfig(
        **_COMMON, intermediate_size=20, num_local_experts=5, hidden_act="tanh"
    ),
}
PROJECTIONS = {"both": ("gate_up_proj", "down_proj"), "gate_up": ("gate_up_proj",), "down": ("down_proj",)}


@pytest.fixture(autouse=True)
def one_thread():
    """Autouse where imported. On a busy machine, threads wait for each other longer than tiny models take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(kind: str, dtype: torch.dtype = torch.float32, layers: int | None = None) -> PreTrainedModel:
    """Random weights, biases included, on transformers' eager experts; two `layers` by default."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def adapt(
    model: nn.Module,
    which: str = "both",
    rank: int = 3,
    fp32: bool = True,
    targets: tuple[str, ...] | list[str] = (),
    **keywords,
) -> PeftModel:
    """PEFT's LoRA on the experts and on `targets`, B not zero; in the model's dtype if not `fp32`."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank + 1,
        target_modules=list(targets),
        target_parameters=[f"experts.{name}" for name in PROJECTIONS[which]],
        **keywords,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=fp32)
    fill(adapted)
    return adapted


def fill(model: nn.Module, seed: int = 1) -> None:
    """Random values in every LoRA B, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def tokens(rows: int = 2, length: int = 16) -> Tensor:
    """[rows, length] int64."""
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(2))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def gradients(model: nn.Module, missing: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradient of every trainable parameter; if some may be `missing`, of the others."""
    model.zero_grad(set_to_none=True)
    out = model(input_ids=tokens(), labels=tokens())
    out.loss.backward()
    return out.logits.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not (missing and parameter.grad is None)
    }


def difference(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def wrappers(model: nn.Module) -> list[nn.Module]:
    """PEFT's parameter wrappers, by class name as PEFT itself sometimes looks for them."""
    return [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
