"""Whether an adapter's file and the model that it was loaded into belong together."""

from __future__ import annotations

import re
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

from moelora.advice import unconverted
from moelora.errors import MoeloraError

_PREFIX = "base_model.model."


def check_adapter(
    model: PeftModel,
    directory: str | Path,
    adapter: str = "default",
    key_mapping: dict[str, str] | None = None,
) -> None:
    """Check, after `PeftModel.from_pretrained(base, directory)`, that every LoRA tensor found its place.

    PEFT warns of parameters that the file has nothing for, which then change nothing, and not of tensors
    that the model has no parameter for.

    Args:
        model: the model with the adapter.
        directory: where its files are.
        adapter: its name in the model. key_mapping: what `from_pretrained` was given.
    Raises: MoeloraError that counts the tensors and parameters left over, with an example of each, and says
        what would load them, where that can be told.
    """
    stored = load_peft_weights(str(directory), device="cpu", key_mapping=key_mapping)
    config = model.peft_config[adapter]
    stored = convert_peft_adapter_state_dict_for_transformers(model, config, stored, adapter)
    present = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    file, own = ({key for key in keys if ".lora_" in key} for keys in (stored, present))
    unplaced, missing = sorted(file - own), sorted(own - file)
    if not unplaced and not missing:
        return
    kind = type(model.get_base_model()).__name__
    told = []
    if unplaced:
        told.append(f"{len(unplaced)} of its {len(file)} LoRA tensors have no place there, as {unplaced[0]}")
    if missing:
        told.append(
            f"{len(missing)} LoRA parameters have no tensor in it, as {missing[0]}: they change nothing"
        )
    advice = _renamed(unplaced, missing) or (unplaced and unconverted(model.get_base_model()))
    raise MoeloraError(
        f"the adapter in {directory} does not fit {kind}: {'; '.join(told)}"
        + (f". {advice}" if advice else "")
    )


def _renamed(unplaced: list[str], missing: list[str]) -> str | None:
    """What to pass to `from_pretrained` if the names differ only in where the layers are; else None."""
    if not unplaced or not missing:
        return None
    one, other = (key.removeprefix(_PREFIX).split(".") for key in (unplaced[0], missing[0]))
    while len(one) > 1 and len(other) > 1 and one[-2:] == other[-2:]:
        one, other = one[:-1], other[:-1]
    pattern, replacement = "^" + re.escape(".".join(one)), ".".join(other)
    renamed = {_PREFIX + re.sub(pattern, replacement, key.removeprefix(_PREFIX)) for key in unplaced}
    if renamed != set(missing):
        return None
    return (
        f"It was trained on a model whose layers are in {'.'.join(one)}, as those of a text model alone are: "
        f"PeftModel.from_pretrained(..., key_mapping={{{pattern!r}: {replacement!r}}}) loads it here"
    )
