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
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

EXPERTS, HIDDEN, INNER, ROUTED = 96, 512, 512, 6


def _peak() -> int:
    """The most that has been resident since the last `_forget_peak`, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _layer(experts: int, hidden: int) -> nn.Module:
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=INNER, num_experts=experts)
    with torch.device("meta"):
        layer = nn.ModuleDict({"experts": Qwen3MoeExperts(config)})
    return layer.to(torch.bfloat16)


def _adapted(layer: nn.Module) -> nn.Module:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(layer, LoraConfig(r=2, target_modules=[], target_parameters=names))
    moelora.enable(adapted)
    fill(adapted)
    return adapted


def _step(adapted: nn.Module, hidden: int) -> list[torch.Tensor]:
    x = torch.randn(8, hidden, dtype=torch.bfloat16, requires_grad=True)
    ids = (torch.arange(16).view(8, 2) % ROUTED) * (EXPERTS // ROUTED)
    y = adapted.get_base_model()["experts"](x, ids, torch.rand(8, 2, dtype=torch.bfloat16))
    return torch.autograd.grad(y.sum(), [x, *(p for p in adapted.parameters() if p.requires_grad)])


def test_mapped_experts_are_not_copied(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in _layer(EXPERTS, HIDDEN).named_parameters()}
    weights = {
        name: torch.empty(s, dtype=torch.bfloat16).normal_(generator=generator) for name, s in shapes.items()
    }
    save_file(weights, tmp_path / "experts.safetensors")
    size = sum(weight.nbytes for weight in weights.values())
    del weights

    layer = _layer(EXPERTS, HIDDEN).requires_grad_(False)
    layer.load_state_dict(load_file(tmp_path / "experts.safetensors"), assign=True)
    adapted = _adapted(layer)
    _forget_peak()
    before = psutil.Process().memory_info().rss
    found = _step(adapted, HIDDEN)
    grown = _peak() - before
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found)
    routed = size * ROUTED // EXPERTS
    assert (
        size > 140e6 and routed < grown < routed + 36e6
    )  # either weight, copied whole, would be 50 MB or more
