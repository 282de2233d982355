"""Whole tiny models of each family, training and generating, beside transformers' eager experts and PEFT."""

import moelora
import pytest
import torch
from model_tiny import (
    adapt,
    difference,
    gradients,
    one_thread,  # noqa: F401  (autouse)
    tokens,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
)

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SHARED = {"intermediate_size": 28, "moe_intermediate_size": 20}
_LATENT = {
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
_DEEPSEEK = {"n_routed_experts": 6, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
FAMILIES = {
    # a shared expert with a gate of its own
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **_COMMON, **_SHARED, num_experts=5, shared_expert_intermediate_size=16, decoder_sparse_step=1
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_COMMON, **_SHARED, head_dim=12, num_experts=5),
    # linear attention in one layer, full attention in the other
    "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(
        **_COMMON, head_dim=16, num_experts=5, moe_intermediate_size=20, shared_expert_intermediate_size=16,
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
    ),
    # a dense first layer, groups of experts, latent attention
    "deepseek_v2": lambda: DeepseekV2Config(
        **_COMMON, **_SHARED, **_LATENT, **_DEEPSEEK, first_k_dense_replace=1,
        topk_method="group_limited_greedy",
    ),
    # routing by sigmoid and a correction bias
    "deepseek_v3": lambda: DeepseekV3Config(
        **_COMMON, **_SHARED, **_LATENT, **_DEEPSEEK, first_k_dense_replace=1
    ),
    "mixtral": lambda: MixtralConfig(**_COMMON, intermediate_size=20, num_local_experts=5),
    "olmoe": lambda: OlmoeConfig(**_COMMON, intermediate_size=20, num_experts=5),
    "gpt_oss": lambda: GptOssConfig(**_COMMON, head_dim=12, intermediate_size=20, num_local_experts=5),
    "glm4_moe": lambda: Glm4MoeConfig(
        **_COMMON, **_SHARED, head_dim=12, n_routed_experts=6, n_group=2, topk_group=1,
        n_shared_experts=1, first_k_dense_replace=1,
    ),
}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def model(request):
    """LoRA on experts and on attention, a trainable router."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(FAMILIES[request.param](), experts_implementation="eager")
    for name, parameter in base.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    adapted = adapt(base, targets=["o_proj"])
    for name, parameter in adapted.named_parameters():
        if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            parameter.requires_grad_(True)
    return adapted


def test_training_and_generation_agree_with_eager(model):
    expected_logits, expected = gradients(model)
    with torch.no_grad():
        expected_loss = model(input_ids=tokens(), labels=tokens()).loss
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    arguments |= {"input_ids": tokens(), "return_dict_in_generate": True}
    expected_text = model.eval().generate(**arguments)

    report = moelora.enable(model)
    assert report.served == report.layers and report.trainable == 2 * len(report.layers) > 0

    text = model.generate(**arguments)
    assert torch.equal(text.sequences, expected_text.sequences)
    assert difference(torch.stack(text.logits), torch.stack(expected_text.logits)) < 1e-5
    logits, found = gradients(model.train())
    assert difference(logits, expected_logits) < 1e-5
    with torch.no_grad():
        assert difference(model(input_ids=tokens(), labels=tokens()).loss, expected_loss) < 1e-6
    assert found.keys() == expected.keys() and any("o_proj" in name for name in found)
    assert sum(name.endswith(("gate.weight", "router.weight")) for name in found) == len(report.layers)
    for name, gradient in expected.items():
        assert gradient.norm() > 0 and difference(found[name], gradient) < 1e-5, name
