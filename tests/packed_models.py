"""Fixtures of the tests of `moelora.from_pretrained`: checkpoints written once, and models of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import moelora
import pytest
import torch
from model_tiny import adapt
from moelora.experts import is_experts
from packed_files import LAYOUTS, write
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import torch_moelora


class Checkpoint(NamedTuple):
    packed: Path
    dense: Path  # the same numbers
    cache: Path

    def model(self, **kwargs) -> PreTrainedModel:
        return moelora.from_pretrained(self.packed, cache_dir=self.cache, **kwargs)

    def other(self, **kwargs) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.dense, **kwargs)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The checkpoint of a layout, by its name."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            home = tmp_path_factory.mktemp("layout")
            write(LAYOUTS[name], home / "packed", home / "dense")
            made[name] = Checkpoint(home / "packed", home / "dense", home / "cache")
        return made[name]

    return get


@pytest.fixture
def one_family():
    """Few rows take other kernels where weights lie the other way round, as gpt-oss' dense ones beside its
    codes: one family for all of them.
    """
    torch_moelora.set_batch_invariant(True)
    yield
    torch_moelora.set_batch_invariant(False)


def experts(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_experts(module)]


def adapted(model: nn.Module, **kwargs) -> PeftModel:
    """LoRA on the experts and on attention, the same for every model of a family."""
    torch.manual_seed(3)  # of A
    return adapt(model, targets=["q_proj"], **kwargs)
