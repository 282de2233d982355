"""The configuration of a checkpoint, as transformers reads it, or of a model that it has under another name.

Kimi-K2 is a DeepSeek-V3, and Kimi-K2.5 one inside a model that sees. Their files name code of their own,
which transformers' model makes unnecessary: it is never run.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from moelora.packed_layout import SECTION


class _Same(NamedTuple):
    """What a checkpoint is: transformers' class, and where in it that is."""

    kind: str  # transformers' "model_type"
    model: str  # its causal language model
    part: str | None = None  # of config.json
    prefix: str = ""  # of the tensors
    left_out: str = ""  # a pattern of the names of the others


_DEEPSEEK = ("deepseek_v3", "DeepseekV3ForCausalLM")
SAME = {
    "kimi_k2": _Same(*_DEEPSEEK),
    "kimi_k25": _Same(*_DEEPSEEK, "text_config", "language_model.", r"^(vision_tower|mm_projector)\."),
}


class Found(NamedTuple):
    """A checkpoint's configuration."""

    config: PreTrainedConfig
    unused: dict[str, Any]  # of the arguments, what is none of the configuration's
    prefix: str = ""  # what the names of its tensors begin with, that the model's do not
    left_out: str = ""  # a pattern of the names of tensors that the model does not have

    @property
    def key_mapping(self) -> dict[str, str]:
        """transformers' argument for the names of the tensors."""
        return {rf"^{re.escape(self.prefix)}": ""} if self.prefix else {}


def read(where: str | os.PathLike, **kwargs: Any) -> Found:
    """Of a local checkpoint, or of one on the hub.

    kwargs: those of transformers' `AutoConfig.from_pretrained`, and any other.

    Raises: what transformers raises for one that cannot be read, or is none.
    """
    kept = {
        name: value for name, value in kwargs.items() if name not in ("trust_remote_code", "code_revision")
    }
    given, unused = PreTrainedConfig.get_config_dict(where, **kept)
    same = SAME.get(given.get("model_type"))
    if same is None:
        return Found(*AutoConfig.from_pretrained(where, return_unused_kwargs=True, **kwargs))
    found = given if same.part is None else given[same.part]
    section = found.get(SECTION) or given.get(SECTION)
    told = {"model_type": same.kind, "architectures": [same.model], "name_or_path": os.fspath(where)}
    told |= {SECTION: section} if section else {}
    plain = {name: value for name, value in found.items() if name != "auto_map"} | told
    config, unused = CONFIG_MAPPING[same.kind].from_dict(plain, return_unused_kwargs=True, **unused)
    return Found(config, unused, same.prefix, same.left_out)
