"""Checkpoints of a run, mixed into any Trainer: whole or absent, and resumed without an extra step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from moelora.commands import directory, finite, resuming, signals

KEPT = 1  # checkpoints, beside the best one


@dataclass
class Record:
    """What every checkpoint tells of its run."""

    options: dict[str, Any]
    facts: Callable[[], dict[str, Any]] = dict  # fingerprints


class AtomicCheckpoints(Trainer):
    """Mixed into a Trainer class: its checkpoints appear under their name only when complete.

    With a `record` they can be resumed, and signals and numbers that are not finite are looked after.
    """

    record: Record | None = None
    _staging: Path | None = None
    _extended = False

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        out, step = Path(self.args.output_dir), self.state.global_step
        if self.record is not None:
            finite.check_adapter(self.model, step, self._get_learning_rate())

        def write(path: Path) -> None:
            self._staging = path.parent
            try:
                super(AtomicCheckpoints, self)._save_checkpoint(model, trial)
            finally:
                self._staging = None
            # Trainer's guess, made where it was not complete yet; the step says it.
            self.state.best_model_checkpoint = None
            self.state.save_to_json(str(path / TRAINER_STATE_NAME))
            if self.record is not None:
                facts = {"step": step, "trained": self._trained(), "best": self.state.best_global_step}
                resuming.complete(path, self.record.options, {**self.record.facts(), **facts})

        written = directory.publish(out, f"checkpoint-{step}", write)
        best = f"checkpoint-{self.state.best_global_step}"
        directory.remove_checkpoints(out, keep=KEPT, but=(written.name, best))

    def _trained(self) -> bool:
        """Whether the training is over, rather than stopped by a signal."""
        over = self.state.global_step >= self.state.max_steps
        return over or (self.control.should_training_stop and signals.ending() is None)

    def restore(self, checkpoint: Path) -> TrainOutput:
        """The model and the state of a checkpoint whose training is over, without a further step."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        return TrainOutput(self.state.global_step, 0.0, {})

    def go_on(self, checkpoint: Path | None, trained: bool = False, extended: bool = False) -> TrainOutput:
        """Trains, from a verified checkpoint if there is one. One whose training is over (`trained`) is only
        loaded, unless the run is `extended`: then the rate goes on along the schedule of the longer run.
        """
        if checkpoint is None:
            return self.train()
        if trained and not extended:
            return self.restore(checkpoint)
        self._extended = extended
        return self.train(resume_from_checkpoint=str(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._extended:  # the saved rate is the old schedule's
            schedule = self.lr_scheduler
            factors = [factor(schedule.last_epoch) for factor in getattr(schedule, "lr_lambdas", ())]
            for group, factor in zip(self.optimizer.param_groups, factors, strict=False):
                group["lr"] = group["initial_lr"] * factor
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # which is logged
            print(
                f"extended to {self.state.max_steps} steps: from step {self.state.global_step + 1} on, the "
                f"rate follows the {self.args.lr_scheduler_type.value} schedule of a run of that length, "
                f"from {self.optimizer.param_groups[0]['lr']:.2e}"
            )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.record is not None:
            finite.check_loss(loss, self.model, inputs, self.state.global_step + 1)
        return loss


class Watch(TrainerCallback):
    """Turns signals into checkpoints at the end of a step, and looks at gradients before they are used."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        finite.check_gradients(model, state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        if signals.take_save():
            control.should_save = True
        if signals.ending() is not None:
            control.should_save = control.should_training_stop = True
