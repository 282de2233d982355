"""`python -m moelora synthesize`: a checkpoint of a known model's shape with random weights."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from moelora import checkpoint_writer, known_models, model_names, packed_layout, synthetic
from moelora.commands import choices
from moelora.commands.default_model import END_OF_TEXT, byte_tokenizer
from moelora.errors import MoeloraError
from moelora.packed_layout import Choice, Layout


def main(explicit: dict[str, Any]) -> None:
    """Writes the checkpoint. MoeloraError tells the user what to mend."""
    started = time.perf_counter()
    out = Path(explicit["out"])
    checkpoint_writer.check_free(out)
    layout = choices.layout(explicit)
    workers = choices.workers(explicit)
    config = _config(explicit, layout)
    model = model_names.outline(config)
    names = model_names.Names(model)
    choices.check_shapes(_packed(names, layout))
    items = synthetic.items(names, layout, explicit["seed"])
    source = {
        "model": hashlib.sha256(json.dumps(_sizes(config)).encode()).hexdigest(),
        "layout": None if layout is None else layout.section(),
        "seed": explicit["seed"],
    }

    def beside(directory: Path, written: checkpoint_writer.Written) -> None:
        config.save_pretrained(directory)
        byte_tokenizer().save_pretrained(directory)
        GenerationConfig.from_model_config(config).save_pretrained(directory)

    parameters = sum(tensor.numel() for tensor in names.own().values())
    written = checkpoint_writer.write(out, items, source, beside, workers, "synthesize")
    print(choices.finished(out, written, time.perf_counter() - started))
    how = f"experts {layout.experts}" if layout else "dense"
    how += f", linear layers {layout.linears}" if layout and layout.linears else ""
    print(f"{type(model).__name__}, {parameters / 1e9:.2f} G parameters, {how}; random weights of seed "
          f"{explicit['seed']}")  # fmt: skip


def _config(explicit: dict[str, Any], layout: Layout | None) -> PreTrainedConfig:
    name, layers = explicit["name"], explicit.get("layers")
    if Path(name).is_dir():
        config = model_names.configuration(Path(name))
        config = config if layers is None else known_models.shortened(config, layers)
        if hasattr(config, packed_layout.SECTION):
            delattr(config, packed_layout.SECTION)
    else:
        config = known_models.config(name, layers)
    config.dtype = choices.DENSE.get(explicit["format"], "bfloat16")
    if layout is not None:
        setattr(config, packed_layout.SECTION, layout.section())
    text, tokenizer = config.get_text_config(), byte_tokenizer()
    if text.vocab_size < len(tokenizer):
        raise MoeloraError(
            f"{name} has {text.vocab_size} tokens, expected at least {len(tokenizer)}, for bytes"
        )
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    text.eos_token_id = text.pad_token_id = end
    text.bos_token_id = None
    return config


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    found = json.loads(config.to_json_string())
    found.pop(packed_layout.SECTION, None)
    return found


def _packed(names: model_names.Names, layout: Layout | None) -> dict[str, tuple[Choice, int, int]]:
    """The weights to pack, with N and K."""
    if layout is None:
        return {}
    own, experts = names.own(), names.experts()
    found = {
        name: (layout.experts, *model_names.oriented(module, own[name]).shape[1:])
        for name, module in experts.items()
    }
    if layout.linears is not None:
        found |= {name: (layout.linears, *own[name].shape) for name in names.linears()}
    return found
