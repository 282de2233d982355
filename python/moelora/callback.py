"""The operators for trainers that somebody else builds: a callback for transformers' Trainer."""

from __future__ import annotations

import logging

from transformers import TrainerCallback

from moelora.attach import enable, report

logger = logging.getLogger("moelora")


class Callback(TrainerCallback):
    """Enables the model when the training begins, and says at its end if LoRA on experts saw no gradient.

    For frameworks that load the model and attach the adapters themselves: pass `moelora.Callback()` wherever
    they take transformers callbacks. It logs `enable`'s report.

    Raises: MoeloraError when the training begins, if no layer of the model can use the operators.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        logger.info("%s", enable(model))

    def on_train_end(self, args, state, control, model=None, **kwargs):
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
