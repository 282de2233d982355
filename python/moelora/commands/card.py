"""The model card beside an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_BODY = """
# LoRA adapter of {name}

LoRA on the experts of `{base}`, rank {rank}, alpha {alpha:g}: {parameters:.2f} M parameters in PEFT's format.

| | |
|---|---|
| data | {data} |
| tokens | {train_tokens:,} to train on, {held_out_tokens:,} held out |
| steps | {steps:,}, learning rate {rate:g} |
| held-out loss of the base | {before:.4f} nats a token |
| held-out loss with the adapter | {after:.4f} nats a token{best} |
| made with | {versions} |

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "THIS DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("THIS DIRECTORY")
```

`moelora.enable(model)` then computes its experts on torch_moelora's operators; nothing needs it.
`python -m moelora chat {base} THIS_DIRECTORY` tries it.
"""


def text(base: Path, summary: dict[str, Any]) -> str:
    """The card of a run, from its summary: data, base, figures, and how to load the adapter."""
    options, loss = summary["options"], summary["held_out_loss"]
    best = summary.get("best_step")
    body = _BODY.format(
        name=base.name,
        base=str(base),
        rank=options["rank"],
        alpha=options["alpha"],
        parameters=summary["trainable_parameters"] / 1e6,
        data=", ".join(f"`{path}`" for path in options["data"] or []) or "Python's language reference",
        train_tokens=summary["train_tokens"],
        held_out_tokens=summary["held_out_tokens"],
        steps=summary["steps"],
        rate=options["learning_rate"],
        before=loss["base"],
        after=loss["tuned"],
        best=f", of step {best}" if best else "",
        versions=", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
    )
    about = ModelCardData(
        base_model=str(base),
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "moe", "torch_moelora"],
    )
    return str(ModelCard(f"---\n{about.to_yaml()}\n---\n{body}"))
