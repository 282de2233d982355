"""FSDP2 as accelerate sets it up, on placed models: the part of tests/placed_checks.py that takes it."""

from __future__ import annotations

from typing import Any

import moelora
import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from model_tiny import adapt, build, difference, tokens
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor


def _model() -> PeftModel:
    torch.manual_seed(4)
    model = adapt(build("qwen3_moe"), targets=["o_proj"])
    moelora.enable(model)
    return model


def _accelerated(whose: str, ignored: str | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        ignored_modules=ignored,
    )
    accelerator = Accelerator(cpu=True)
    # As it does itself where processes have accelerators, but not where they have CPUs.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    assert accelerator.is_fsdp2
    model = _model()
    moelora.place(model, whose)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return accelerator.prepare(model, optimizer)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def accelerated(here: Any) -> None:
    """The factors of experts stay out of it, and are trained as one process trains them."""
    rows = tokens(2 * here.world)
    single = _model()
    _train(single, torch.optim.AdamW([p for p in single.parameters() if p.requires_grad], lr=1e-2), rows)
    theirs = dict(single.named_parameters())
    for whose in ("spread", "rank0"):
        model, optimizer = _accelerated(whose, r".*\.experts")
        _train(model, optimizer, rows.chunk(here.world)[here.rank])
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) == (".experts." not in name), name
            if parameter.requires_grad:
                part = getattr(model.get_submodule(name.rpartition(".")[0]), "_moelora_part", None)
                found = parameter.full_tensor() if part is None else parameter
                expected = theirs[name] if part is None else part.own(theirs[name])
                assert not expected.numel() or difference(found, expected) < 1e-4, name
    with pytest.raises(NotImplementedError, match="FSDP does not support non-contiguous parameters"):
        _accelerated("spread", None)  # not told, it goes no further: stand-ins of weights cannot be sharded
