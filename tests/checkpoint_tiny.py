"""What tests of the commands that write checkpoints share: tiny models whose rows every format divides."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from moelora import checkpoint_writer, packed_layout
from moelora.commands import default_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

_COMMON = {
    "vocab_size": 264,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "bos_token_id": None,
}
CONFIGS = {
    # a file's matrix for each expert
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_COMMON, head_dim=32, intermediate_size=96, moe_intermediate_size=64, num_experts=6
    ),
    # all experts in a tensor [E, in, out], biases, interleaved
    "gpt_oss": lambda: GptOssConfig(
        **_COMMON, head_dim=32, intermediate_size=64, num_local_experts=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    # other names on disk
    "mixtral": lambda: MixtralConfig(**_COMMON, intermediate_size=64, num_local_experts=4),
    # a first layer without experts, and shared experts
    "deepseek_v2": lambda: DeepseekV2Config(
        **_COMMON | {"num_key_value_heads": 2}, intermediate_size=96, moe_intermediate_size=64,
        n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=64, q_lora_rank=None,
        qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def interruptible():
    """Autouse where imported. Even where the caller ignores Ctrl-C, as nohup and `&` do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def model(kind: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """With random weights."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[kind](), experts_implementation="eager")
    for name, parameter in made.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return made.to(dtype)


def save(made: PreTrainedModel, directory: Path, **keywords) -> Path:
    """A checkpoint of a model, with bytes as tokens."""
    made.save_pretrained(directory, **keywords)
    default_model.byte_tokenizer().save_pretrained(directory)
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All that are in a checkpoint's files."""
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def weight(directory: Path, name: str, choice: packed_layout.Choice) -> torch.Tensor:
    """The packed weight `name` of a checkpoint, unpacked."""
    there = tensors(directory)
    parts = {p: there[f"{name}.{p}"] for p in packed_layout.PARTS if f"{name}.{p}" in there}
    return packed_layout.packed(choice, parts).dequantize(torch.float32)


def digests(directory: Path) -> dict[str, str]:
    """Of all its files."""
    return {path.name: checkpoint_writer.digest(path) for path in sorted(directory.iterdir())}


def interrupt_in_file(monkeypatch, number: int, signum: int = signal.SIGTERM) -> None:
    """Sends the signal while file `number` is being written, counted from 0."""
    real, made = checkpoint_writer.ShardFile, []

    class Interrupted(real):
        def write(self, *arguments) -> None:
            if self not in made:
                made.append(self)
                if len(made) == number + 1:
                    os.kill(os.getpid(), signum)
            super().write(*arguments)

    monkeypatch.setattr(checkpoint_writer, "ShardFile", Interrupted)
