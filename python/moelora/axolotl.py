"""A plugin for axolotl: `plugins: [moelora.axolotl.Plugin]` in its configuration, options under `moelora`."""

from __future__ import annotations

import logging
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict

from moelora.attach import disable, enable, report
from moelora.errors import MoeloraError

logger = logging.getLogger("moelora")


class Options(BaseModel):
    """What stands under the key `moelora`.

    Attributes:
        enabled: whether the operators compute the experts.
        required: whether a model without a layer for them is an error, or a warning.
    """

    model_config = ConfigDict(extra="forbid")

    enabled: bool = True
    required: bool = True


class MoeloraArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    moelora: Options = Options()


class Plugin(BasePlugin):
    """Puts the model on the operators once axolotl has loaded it and its adapters."""

    def get_input_args(self) -> str:
        """Where axolotl finds the options' schema."""
        return "moelora.axolotl.MoeloraArgs"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """Raises: MoeloraError if no layer can use the operators and `required` is set."""
        options = _options(cfg)
        if not options.enabled:
            return
        try:
            logger.info("%s", enable(model))
        except MoeloraError as error:
            if options.required:
                raise
            logger.warning("%s", error)

    def post_train(self, cfg: Any, model: Any) -> None:
        """Warns where LoRA on experts saw no gradient, and takes the operators away again."""
        if not _options(cfg).enabled:
            return
        if untrained := report(model).untrained:
            logger.warning("adapted expert parameters that saw no gradient: %s", ", ".join(untrained))
        disable(model)


def _options(cfg: Any) -> Options:
    given = cfg.get("moelora") or {}
    return given if isinstance(given, Options) else Options(**dict(given))
