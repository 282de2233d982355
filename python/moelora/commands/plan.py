"""What a run would do: steps, memory, time."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from moelora.commands import data, inspect, memory


def steps(options: argparse.Namespace, rows: int) -> int:
    """Optimizer steps of a run over so many rows."""
    if options.steps is not None:
        return options.steps
    return math.ceil(options.epochs * _steps_per_epoch(options, rows))


def _steps_per_epoch(options: argparse.Namespace, rows: int) -> int:
    return math.ceil(math.ceil(rows / options.batch_size) / options.grad_accumulation)


def warmup(value: float, steps: int) -> int:
    """Steps of warm-up: a share below 1, at least one step if not 0, or their number."""
    return int(value) if value >= 1 or not value else max(1, int(value * steps))


def step_tokens(options: argparse.Namespace, tokens: data.Tokens) -> int:
    """Tokens in a step, about: padding and the last rows of an epoch aside."""
    rows = min(options.batch_size, len(tokens.train)) * options.grad_accumulation
    return max(1, round(rows * data.count(tokens.train) / len(tokens.train)))


def length(options: argparse.Namespace, tokens: data.Tokens) -> str:
    """How long a run is, in words."""
    total = steps(options, len(tokens.train))
    epochs = total / _steps_per_epoch(options, len(tokens.train))
    each = f"{options.batch_size} rows" + (
        f" × {options.grad_accumulation}" if options.grad_accumulation > 1 else ""
    )
    rising = warmup(options.warmup, total)
    return (
        f"{total:,} steps of {each}, about {step_tokens(options, tokens):,} tokens: {epochs:.2g} epochs; "
        f"rate {options.learning_rate:g}, {options.scheduler}, {rising:,} steps of warm-up"
    )


def _memory(options: argparse.Namespace, forward: int) -> memory.Plan:
    return memory.Plan(
        options.rank,
        options.projections,
        tuple(options.target_modules),
        max(1, forward // options.seq_length),
        min(forward, options.seq_length),
        options.optimizer,
        options.step_in_backward,
        options.target_rank,
        options.gradient_checkpointing,
    )


def told(
    outline: nn.Module,
    config: PreTrainedConfig,
    options: argparse.Namespace,
    tokens: data.Tokens,
    directory: Path | None,
) -> str:
    """Steps, memory and time, in lines; without the weights, after some seconds of measuring.

    `directory`: the checkpoint's; None if it is yet to be made. `outline` is of no use afterwards.
    """
    total = steps(options, len(tokens.train))
    forward = max(1, step_tokens(options, tokens) // options.grad_accumulation)
    found = inspect.cost(outline, config, options.rank, options.projections, forward)
    seconds = sum(found.seconds()) * options.grad_accumulation
    if options.gradient_checkpointing:
        seconds *= 4 / 3
    times = 2 + (total // options.eval_every if options.eval_every else 0)
    base = inspect.base(directory, outline, found)
    lines = [
        f"plan     {length(options, tokens)}",
        *inspect.memory_lines(outline, base, _memory(options, forward)),
        f"time     about {inspect.duration(seconds)} a step, {inspect.duration(seconds * total)} in all, on "
        f"{torch.get_num_threads()} threads;",
        f"         besides attention scores, {times} evaluations and reading the weights",
    ]
    return "\n".join(lines)
