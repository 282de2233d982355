"""Local checkpoints: what they are, whether they have experts, and loading them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moelora.errors import MoeloraError, first_line
from moelora.experts import is_experts, outside


def inspect(directory: Path) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The configuration and tokenizer of a checkpoint whose model has experts. No weights are loaded.

    Raises: MoeloraError naming the directory and what it lacks.
    """
    _check_directory(directory)
    if not any(directory.glob("*.safetensors")):
        raise MoeloraError(
            f"{directory} is not a transformers checkpoint: expected weights (*.safetensors) in it"
        )
    _, config = outline(directory)
    with _loading(directory):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return config, tokenizer


def outline(directory: Path) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """The model with experts that a checkpoint's configuration describes, on the meta device, and the latter.

    Raises: MoeloraError naming the directory and what it lacks.
    """
    _check_directory(directory)
    with _loading(directory):
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
    if not any(is_experts(module) for module in empty.modules()):
        raise MoeloraError(
            f"{directory} holds a {type(empty).__name__}, which has no expert layers: expected a "
            f"mixture-of-experts model that follows transformers' experts interface{outside(empty)}"
        )
    return empty, config


def load(directory: Path, dtype: str) -> PreTrainedModel:
    """The causal language model in `directory`; `dtype` is a name or "auto".

    Raises: MoeloraError if it cannot be loaded.
    """
    with _loading(directory):
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)


@contextmanager
def _loading(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        raise MoeloraError(f"cannot load a language model from {directory}: {first_line(error)}") from None


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise MoeloraError(f"{directory} is not a directory, expected a local transformers checkpoint")
    if not (directory / "config.json").exists():
        raise MoeloraError(f"{directory} is not a transformers checkpoint: expected a config.json in it")


def count(model: nn.Module, trainable: bool = False) -> int:
    """How many parameters a model has, or how many of them are trainable."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)
