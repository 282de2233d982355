"""TRL's SFTTrainer with a progress bar that shows tokens/s and checkpoints that are whole or absent."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from moelora.commands import depth, head, heap, optimizers
from moelora.commands.data import Tokens, padded, spread
from moelora.commands.saving import AtomicCheckpoints
from moelora.errors import MoeloraError, writing
from moelora.linears import slow_in_torch

JSONL = "jsonl"


class TunedTrainer(AtomicCheckpoints, SFTTrainer):
    """TRL's trainer as `finetune` uses it."""

    steps_in_backward = False
    _handles: list[RemovableHandle] | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.steps_in_backward and self._handles is None:
            self._handles = optimizers.step_in_backward(optimizer, self.model, self._step)
        return optimizer

    def go_on(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().go_on(*args, **kwargs)
        finally:  # a backward after the training is none of its steps
            for handle in self._handles or ():
                handle.remove()
            self._handles = None

    def _step(self) -> int:
        return self.state.global_step + 1

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None with each checkpoint: the command writes one, with figures, beside the adapter."""


class Progress(TrainerCallback):
    """One bar for the training, with the loss and tokens/s of the last steps, and one for each evaluation."""

    def __init__(self, title: str):
        self.title = title
        self.bar: tqdm | None = None
        self.evaluation: tqdm | None = None
        self.seconds: list[float] = []  # of each step of this process
        self.seen: list[int] = []  # tokens up to each of them
        self.waited: float | None = None  # seconds from the process's start to its first step
        self._started = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = _bar(self.title, state.max_steps, initial=state.global_step, unit="step")

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()
        if self.waited is None:
            self.waited = _age()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._started)
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or "loss" not in logs:
            return
        self.seen.append(int(logs["num_tokens"]))
        self.bar.set_postfix_str(
            f"loss {logs['loss']:.3f}, {self.tokens_per_second():.0f} tokens/s", refresh=False
        )

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.evaluation is None:
            self.evaluation = _bar("held-out", len(eval_dataloader), leave=False, delay=2.0)
        self.evaluation.update(1)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None
        if self.bar is not None:
            tqdm.write(f"step {state.global_step}: held-out loss {metrics['eval_loss']:.3f}")

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
        return self.seen[-1] if self.seen else 0

    def tokens_per_second(self, last: int = 10) -> float:
        """Tokens a second over the last steps."""
        if not self.seen:
            return 0.0
        before = self.seen[-last - 1] if len(self.seen) > last else 0
        return (self.seen[-1] - before) / sum(self.seconds[: len(self.seen)][-last:])


class Trim(TrainerCallback):
    """Keeps little more memory than is in use, in a step and from step to step."""

    def __init__(self):
        self._watch: heap.Watch | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._watch = heap.Watch(depth.layers(model))

    def on_step_end(self, args, state, control, **kwargs):
        self._watch.trim()

    def on_train_end(self, args, state, control, **kwargs):
        self._watch.trim()
        self._watch.remove()


class JsonLines(TrainerCallback):
    """Appends a line to a file when the first step begins, and one for each thing that Trainer logs: objects
    with the step and the seconds since the process started.
    """

    def __init__(self, path: Path):
        self.path = path
        self._begun = False

    def on_step_begin(self, args, state, control, **kwargs):
        if not self._begun:
            self._write(state, {})
        self._begun = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._write(state, logs or {})

    def _write(self, state: TrainerState, logs: dict[str, Any]) -> None:
        line = {"step": state.global_step, "seconds": round(_age(), 2), **logs}
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _age() -> float:
    """Seconds since this process started."""
    return time.time() - psutil.Process().create_time()


def _bar(title: str, total: int, **options: Any) -> tqdm:
    """A progress bar; a log file gets a line now and then instead."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(desc=title, total=total, dynamic_ncols=True, mininterval=interval, **options)


def trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Tokens,
    out: Path,
    title: str,
    rows: int,
    **arguments: Any,
) -> tuple[TunedTrainer, Progress]:
    """A trainer over rows of tokens, evaluating on so many of the held-out `rows`, and its progress bar.

    `arguments` are SFTConfig's; each step's loss is kept in `state.log_history`.
    """
    # The adapter and the base have their dtypes, hence no autocast to bf16. The balancing loss of a frozen
    # router would only disturb the adapter.
    given = {
        "lr_scheduler_type": "cosine",
        "bf16": False,
        "gradient_checkpointing": False,
        "router_aux_loss_coef": 0.0,
        "report_to": "none",
    }
    given |= {"packing": True, "packing_strategy": tokens.packing} if tokens.bordered else {}
    args = SFTConfig(
        output_dir=str(out),
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        prediction_loss_only=True,
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **given | arguments,
    )
    progress = Progress(title)
    result = TunedTrainer(
        model,
        args,
        train_dataset=tokens.train,
        eval_dataset=spread(tokens.held_out, rows),
        processing_class=padded(tokenizer),
        callbacks=[progress, Trim()],
    )
    _prepare_head(model)
    result.remove_callback(PrinterCallback)
    result.remove_callback(ProgressCallback)
    return result, progress


def _prepare_head(model: nn.Module) -> None:
    """TRL takes the logits in pieces, by products of torch: in float32 where 16-bit ones are slow. Where the
    head is frozen, in two products instead of three.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if _slow_head(base):
        add_fused_lm_head(base, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy", "is_top1"))
    head.use(base)


def _slow_head(model: nn.Module) -> bool:
    return slow_in_torch(model.get_output_embeddings().weight)


def hides_overflow(model: nn.Module) -> bool:
    """Whether the loss has logits in float32 that the model's own float16 may not hold."""
    return model.dtype is torch.float16 and _slow_head(model)


def evaluating(every: int, keep_best: bool, patience: int, save_every: int) -> dict[str, Any]:
    """SFTConfig's arguments for evaluations while training, and for checkpoints."""
    arguments: dict[str, Any] = {"save_steps": save_every}
    if every:
        arguments |= {"eval_strategy": "steps", "eval_steps": every}
    if keep_best:
        arguments |= {"metric_for_best_model": "eval_loss", "greater_is_better": False, "save_steps": every}
    if patience:
        arguments["restore_callback_states_from_checkpoint"] = True
    return arguments


def check_reports(names: list[str]) -> None:
    """Complains about what cannot be reported to.

    Raises: MoeloraError naming it, and what can.
    """
    able = [JSONL, *sorted(get_available_reporting_integrations())]
    for name in names:
        if name not in able:
            raise MoeloraError(
                f"--report-to {name} is not installed or unknown, here can be: {', '.join(able)}"
            )


def held_out_loss(of: Trainer, name: str = "eval") -> float:
    """Mean loss on the held-out rows, in nats a token; `name_loss` in the log."""
    return of.evaluate(metric_key_prefix=name)[f"{name}_loss"]


def best_checkpoint(state: TrainerState, out: Path) -> Path | None:
    """The checkpoint of the lowest held-out loss, where a run keeps it."""
    return out / f"checkpoint-{state.best_global_step}" if state.best_global_step else None
