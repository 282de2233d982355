"""Experts mapped from a file are read where they are: memory grows by the pages of the routed ones."""

from pathlib import Path

import moelora
import psutil
import torch
from model_tiny import (
    fill,
    one_thread,  # noqa: F401  (autouse)
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

EXPERTS, HIDDEN, INNER, ROUTED = 96, 512, 512, 6


def _peak() -> int:
    """The most that has been resident since the last `_forget_peak`, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _layer() -> nn.Module:
    """Frozen bf16 experts without storage."""
    config = Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS)
    config._experts_implementation_internal = "grouped_mm"
    with torch.device("meta"):
        layer = nn.ModuleDict({"experts": Qwen3MoeExperts(config)})
    return layer.to(torch.bfloat16).requires_grad_(False)


def _adapted(layer: nn.Module) -> nn.Module:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(layer, LoraConfig(r=2, target_modules=[], target_parameters=names))
    fill(adapted)
    return adapted


def _step(adapted: nn.Module, tokens: int, experts: int) -> int:
    """Forward and backward, tokens for `experts` experts; returns by how much the peak exceeds the start."""
    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    ids = (torch.arange(2 * tokens).view(tokens, 2) % experts) * (EXPERTS // experts)
    gates = torch.rand(tokens, 2, dtype=torch.bfloat16)
    _forget_peak()
    before = psutil.Process().memory_info().rss
    y = adapted.get_base_model()["experts"](x, ids, gates)
    found = torch.autograd.grad(y.sum(), [x, *(p for p in adapted.parameters() if p.requires_grad)])
    grown = _peak() - before
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found)
    return grown


def test_mapped_experts_are_not_copied(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(generator=generator)
        for name, parameter in _layer().named_parameters()
    }
    save_file(weights, tmp_path / "experts.safetensors")
    size = sum(weight.nbytes for weight in weights.values())
    del weights
    layer = _layer()
    layer.load_state_dict(load_file(tmp_path / "experts.safetensors"), assign=True)
    adapted = _adapted(layer)
    moelora.enable(adapted)
    routed = size * ROUTED // EXPERTS
    assert size > 140e6
    assert routed < _step(adapted, 8, ROUTED) < routed + 36e6  # either weight, copied, would be 50 MB or more


def test_a_checkpoint_with_fused_experts_trains_where_it_lies(tmp_path):
    """transformers maps it; a step touches the experts of its few tokens, in a whole model."""
    config = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=2,
        vocab_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    rows = torch.arange(3).view(1, 3)
    _forget_peak()
    before = psutil.Process().memory_info().rss
    adapted = _adapted(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"))
    moelora.enable(adapted)
    adapted(input_ids=rows, labels=rows).loss.backward()
    assert not moelora.report(adapted).untrained
    assert size > 140e6 and _peak() - before < 0.6 * size  # the libraries' own share is a third, at most


def test_peak_is_at_most_half_of_transformers_and_peft():
    layer = _layer().to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    adapted = _adapted(layer)
    moelora.enable(adapted)
    ours = _step(adapted, 256, EXPERTS)  # first: what an allocator keeps would otherwise be free for it
    moelora.disable(adapted)
    theirs = _step(adapted, 256, EXPERTS)
    assert ours < 0.5 * theirs
