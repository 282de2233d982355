"""The operators for trainers that somebody else builds: a callback for transformers' Trainer."""

from __future__ import annotations

import logging

from accelerate.state import AcceleratorState
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from moelora.attach import enable, report
from moelora.errors import MoeloraError
from moelora.placement.saving import Keeping
from moelora.placement.spreading import is_placed

logger = logging.getLogger("moelora")


class Callback(TrainerCallback):
    """Enables the model when the training begins, and says at its end if LoRA on experts saw no gradient.

    For frameworks that load the model and attach the adapters themselves: pass `moelora.Callback()` wherever
    they take transformers callbacks. It logs `enable`'s report. A trainer of a placed model (`moelora.place`)
    needs it: it saves on one rank, for which the callback gathers adapters and optimizer state from all.

    Raises: MoeloraError when the training begins, if no layer of the model can use the operators; when a
        trainer is made that would write checkpoints of a placed model under FSDP to go on from.
    """

    def __init__(self) -> None:
        self._keeping: Keeping | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if not is_placed(model):
            return
        fsdp = args.fsdp or getattr(AcceleratorState(), "fsdp_plugin", None)
        if fsdp and args.save_strategy != SaveStrategy.NO and not args.save_only_model:
            raise MoeloraError(
                "save_only_model is False, expected True: under FSDP a checkpoint to go on from would have "
                "one rank's part of placed experts; save_only_model=True writes whole adapters"
            )
        enable(model)  # the optimizer must see what is here of the adapters

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        logger.info("%s", enable(model))
        self._keeping = Keeping(model, optimizer, not args.save_only_model) if is_placed(model) else None

    def on_step_end(self, args, state, control, **kwargs):
        if self._keeping is not None and control.should_save:
            self._keeping.gather()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        if self._keeping is not None and (control.should_save or args.save_strategy == SaveStrategy.BEST):
            self._keeping.gather()

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self._keeping is not None:
            self._keeping.gather()
        found = report(model)
        if found.untrained:
            logger.warning(
                "%d adapted expert parameters saw no gradient in %d steps: %s",
                len(found.untrained),
                state.global_step,
                ", ".join(found.untrained),
            )
        elif not found.trainable:
            logger.warning("nothing on the experts was trained:\n%s", found)
