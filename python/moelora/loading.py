"""`from_pretrained`: transformers' loader, for checkpoints whose experts are to stay packed."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moelora import configurations, layouts, stored, unpacking
from moelora.configurations import Found
from moelora.errors import MoeloraError, one_line
from moelora.packed_layout import METHOD, SECTION

# transformers sets the process's default dtype for the time of a load, and puts back what it found.
LOADING = threading.Lock()
MODELOPT = "hf_quant_config.json"  # where older ModelOpt says it, instead of in config.json


def from_pretrained(
    directory: str | os.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
    owners: str | Sequence[int] | None = None,
    group: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model whose experts stay packed, if they are packed in the files; else as ever.

    Experts run on the operators from the start (`experts_implementation="moelora"`); after adding adapters
    call `moelora.enable(model)`. Files that hold a layer's experts in one tensor (ours, gpt-oss) are mapped.
    Of others the experts are stacked once into files below `cache_dir`, which are mapped from then on. Linear
    layers that are packed in the files stay so, too; other weights are dequantised to the model's dtype.
    Kimi-K2, and the language model of Kimi-K2.5, are transformers' DeepSeek-V3: none of their own code runs.

    Args:
        directory: a local checkpoint, or a name on the hub.
        cache_dir: for stacked experts; None for `moelora` below Hugging Face's home (HF_HOME).
        owners, group: those of `moelora.place`, on all ranks: the model comes enabled and placed, and no
            expert of another rank has been read. None: the model is whole.
        kwargs: transformers' `from_pretrained`'s. device_map must be a device, or one for each
            module, where experts are packed.

    Raises: MoeloraError for a checkpoint that cannot be kept packed, with the way out, and for tensors that
        are missing, of another kind or shape than expected; what transformers raises for the rest.
    """
    if Path(directory).is_dir():
        stored.files(Path(directory))  # an index that lies is told before anything is read
    config = kwargs.pop("config", None)
    if isinstance(config, PreTrainedConfig):
        found = Found(config, kwargs)
    else:
        found = _config(config or directory, kwargs)
    section = _section(found.config, Path(directory))
    if owners is not None:
        loaded = _own(directory, found, section, cache_dir, owners, group)
    else:
        loaded = _whole(directory, found, section, cache_dir)
    return _alone(loaded, found) if found.prefix else loaded


def _alone(loaded: Any, given: Found) -> Any:
    """A language model that was inside another one, saved by its own names; what is told of its load too."""
    model, *info = loaded if isinstance(loaded, tuple) else (loaded,)
    model._weight_conversions = [
        entry
        for entry in getattr(model, "_weight_conversions", None) or []
        if not set(entry.source_patterns) & given.key_mapping.keys()
    ]
    for told in info:
        unexpected = told["unexpected_keys"]
        told["unexpected_keys"] = type(unexpected)(k for k in unexpected if not re.match(given.left_out, k))
    return loaded


def _whole(
    directory: str | os.PathLike,
    given: Found,
    section: dict[str, Any] | None,
    cache_dir: str | os.PathLike | None,
) -> PreTrainedModel:
    config, kwargs = given.config, given.unused
    if section is None:
        with LOADING:
            return AutoModelForCausalLM.from_pretrained(directory, config=config, **kwargs)
    layout = layouts.recognise(section)
    known = {} if layout is not layouts.OURS else section
    own = {**known, "quant_method": METHOD, "cache_dir": None if cache_dir is None else os.fspath(cache_dir)}
    if layout is not layouts.OURS:
        own["source"] = section
    own |= {"key_mapping": kwargs.get("key_mapping"), "left_out": given.left_out}
    config.quantization_config = own
    return _load(directory, config, kwargs)


def _own(
    directory: str | os.PathLike,
    given: Found,
    section: dict[str, Any] | None,
    cache_dir: str | os.PathLike | None,
    owners: str | Sequence[int],
    group: Any,
) -> PreTrainedModel:
    """A placed model. Packed experts are mapped, so that copying this rank's out of them reads no other."""
    from moelora.attach import enable
    from moelora.placement import reading
    from moelora.placement.group import Group
    from moelora.placement.spreading import place_on

    together = Group(group)
    config, kwargs = given.config, given.unused
    if section is None:
        config.quantization_config = {"quant_method": reading.METHOD}
        token = reading.SHARE.set((together, owners))
        try:
            with LOADING:
                found = AutoModelForCausalLM.from_pretrained(directory, config=config, **kwargs)
        finally:
            reading.SHARE.reset(token)
    else:
        found = _whole(directory, given, section, cache_dir)
    model = found[0] if isinstance(found, tuple) else found
    if section is None:
        model.hf_quantizer.remove_quantization_config(model)
    enable(model)
    place_on(model, owners, together)
    return found


def _load(directory: str | os.PathLike, config: PreTrainedConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    """transformers tells what a conversion raised in a table that it logs; here it is what is raised."""
    problems: list[MoeloraError] = []
    token = unpacking.PROBLEMS.set(problems)
    try:
        with LOADING:
            return AutoModelForCausalLM.from_pretrained(directory, config=config, **kwargs)
    except RuntimeError as error:
        if not problems:
            raise
        raise problems[0] from error
    finally:
        unpacking.PROBLEMS.reset(token)


def _config(where: Any, kwargs: dict[str, Any]) -> Found:
    """The configuration, and the loader's arguments. A dtype is the model's own argument."""
    dtypes = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
    passed = {
        name: kwargs[name]
        for name in (
            "token",
            "revision",
            "local_files_only",
            "subfolder",
            "trust_remote_code",
            "force_download",
        )
        if name in kwargs
    }
    found = configurations.read(where, **kwargs)
    mapping = {"key_mapping": found.key_mapping} if found.prefix else {}
    return found._replace(unused={**passed, **mapping, **found.unused, **dtypes})


def _section(config: PreTrainedConfig, directory: Path) -> dict[str, Any] | None:
    """ "quantization_config", wherever the checkpoint has it."""
    section = getattr(config, SECTION, None) or getattr(config.get_text_config(), SECTION, None)
    if section is None and (directory / MODELOPT).is_file():
        try:
            section = json.loads((directory / MODELOPT).read_text(encoding="utf-8"))["quantization"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise MoeloraError(f"cannot read {directory / MODELOPT}: {one_line(error)}") from None
    if section is None:
        return None
    section = section if isinstance(section, dict) else section.to_dict()
    return {name: value.value if hasattr(value, "value") else value for name, value in section.items()}
