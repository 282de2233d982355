"""TRL's SFTTrainer with a progress bar that shows tokens/s and checkpoints that are whole or absent."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from moelora.commands.saving import AtomicCheckpoints


class TunedTrainer(AtomicCheckpoints, SFTTrainer):
    """TRL's trainer as `finetune` uses it."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None with each checkpoint: the command writes one, with figures, beside the adapter."""


class Progress(TrainerCallback):
    """One bar for the training, with the loss and tokens/s of the last steps, and one for each evaluation."""

    def __init__(self, title: str, tokens_per_step: int):
        self.title, self.tokens_per_step = title, tokens_per_step
        self.bar: tqdm | None = None
        self.evaluation: tqdm | None = None
        self.seconds: list[float] = []  # of each step of this process
        self._started = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = _bar(self.title, state.max_steps, initial=state.global_step, unit="step")

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._started)
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or "loss" not in logs:
            return
        self.bar.set_postfix_str(
            f"loss {logs['loss']:.3f}, {self.tokens_per_second():.0f} tokens/s", refresh=False
        )

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.evaluation is None:
            self.evaluation = _bar("held-out", len(eval_dataloader), leave=False, delay=2.0)
        self.evaluation.update(1)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluation.close()
        self.evaluation = None

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Close whatever bar is open, so that what is printed next starts on its own line."""
        for bar in (self.bar, self.evaluation):
            if bar is not None:
                bar.close()
        self.bar = self.evaluation = None

    @property
    def tokens(self) -> int:
        """Tokens trained on in this process."""
        return self.tokens_per_step * len(self.seconds)

    def tokens_per_second(self, last: int = 10) -> float:
        """Tokens a second over the last steps."""
        recent = self.seconds[-last:]
        return self.tokens_per_step * len(recent) / sum(recent) if recent else 0.0


def _bar(title: str, total: int, **options: Any) -> tqdm:
    """A progress bar; a log file gets a line now and then instead."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc=title, total=total, dynamic_ncols=True, mininterval=interval, **options)


def trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    held_out: Dataset,
    out: Path,
    title: str,
    **arguments: Any,
) -> tuple[TunedTrainer, Progress]:
    """A trainer over tokenized rows, all of one length (column `input_ids`), and its progress bar.

    `arguments` are SFTConfig's; each step's loss is kept in `state.log_history`.
    """
    # The adapter and the base have their dtypes, hence no autocast to bf16. The balancing loss of a frozen
    # router would only disturb the adapter.
    given = {"bf16": False, "gradient_checkpointing": False, "router_aux_loss_coef": 0.0} | arguments
    args = SFTConfig(
        output_dir=str(out),
        lr_scheduler_type="cosine",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        prediction_loss_only=True,
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **given,
    )
    rows = min(args.train_batch_size, len(train)) * args.gradient_accumulation_steps
    progress = Progress(title, rows * len(train[0]["input_ids"]))
    result = TunedTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[progress],
    )
    result.remove_callback(PrinterCallback)
    result.remove_callback(ProgressCallback)
    return result, progress


def held_out_loss(of: Trainer) -> float:
    """Mean loss on the held-out rows, in nats a token."""
    return of.evaluate()["eval_loss"]
