"""Configurations of known models, with the sizes that their makers published."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig

from moelora.errors import MoeloraError

_QWEN3 = {
    "vocab_size": 151936, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "max_position_embeddings": 262144, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000},
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
_GPT_OSS = {
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "num_experts_per_tok": 4, "sliding_window": 128,
    "swiglu_limit": 7.0, "attention_bias": True, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "initial_context_length": 4096, "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 150000, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip

# Name → (configuration class, causal language model, sizes).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3-30b-a3b": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32,
    }),
    "qwen3-235b-a22b": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_hidden_layers": 94, "num_attention_heads": 64,
    }),
    "qwen3.5-35b-a3b": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {
        "vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }),
    "gpt-oss-20b": ("GptOssConfig", "GptOssForCausalLM", _GPT_OSS | {
        "num_hidden_layers": 24, "num_local_experts": 32,
    }),
    "gpt-oss-120b": ("GptOssConfig", "GptOssForCausalLM", _GPT_OSS | {
        "num_hidden_layers": 36, "num_local_experts": 128,
    }),
    "deepseek-v2-lite": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000, "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
        },
    }),
    "mixtral-8x7b": ("MixtralConfig", "MixtralForCausalLM", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "max_position_embeddings": 32768, "sliding_window": None, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000}, "tie_word_embeddings": False,
    }),
    "olmoe-1b-7b": ("OlmoeConfig", "OlmoeForCausalLM", {
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": False, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "tie_word_embeddings": False,
    }),
}  # fmt: skip


def config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """The configuration of a known model in bfloat16, with `layers` of its layers if given.

    Raises: MoeloraError if it is not known, or has fewer layers.
    """
    if name not in MODELS:
        raise MoeloraError(
            f"NAME is {name!r}, expected one of {', '.join(MODELS)}, or a directory with a config.json"
        )
    kind, model, sizes = MODELS[name]
    found = getattr(transformers, kind)(**sizes, dtype="bfloat16", architectures=[model])
    return found if layers is None else shortened(found, layers)


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The configuration with the first `layers` of its layers.

    Raises: MoeloraError if it has fewer, or those have no experts.
    """
    text = config.get_text_config()
    if not 1 <= layers <= text.num_hidden_layers:
        raise MoeloraError(f"--layers is {layers}, expected at most the model's {text.num_hidden_layers}")
    text.num_hidden_layers = layers
    for name, value in vars(text).items():  # one entry a layer
        if name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            setattr(text, name, value[:layers])
    return config
