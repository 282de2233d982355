"""The files of a run, each complete or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from moelora.commands import config, directory

SUMMARY, CURVE, ADAPTER, CONFIG, LOG = directory.FINISHED, "loss.png", "adapter", "config.yaml", "log.jsonl"


def write_adapter(out: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase, card: str) -> Path:
    """The adapter in PEFT's format, and the tokenizer and a model card beside it."""

    def write(path: Path) -> None:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        (path / "README.md").write_text(card, encoding="utf-8")

    return directory.publish(out, ADAPTER, write)


def write_config(out: Path, chosen: dict[str, Any]) -> Path:
    """The options, as --config takes them."""
    return directory.publish(
        out, CONFIG, lambda path: path.write_text(config.written(chosen), encoding="utf-8")
    )


def write_summary(out: Path, summary: dict[str, Any]) -> Path:
    """The run as JSON."""
    text = json.dumps(summary, indent=2, default=str) + "\n"
    return directory.publish(out, SUMMARY, lambda path: path.write_text(text, encoding="utf-8"))


def write_curve(
    out: Path,
    losses: list[tuple[int, float]],
    evaluations: list[tuple[int, float]],
    before: float,
    after: float,
) -> Path:
    """The training loss over the steps, and the held-out loss before, after and between."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, values = zip(*losses, strict=True)
    axes.plot(steps, values, color="tab:blue", linewidth=1, alpha=0.35, label="training loss")
    axes.plot(steps, _smooth(values), color="tab:blue", linewidth=2, label="training loss, smoothed")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="tab:green", markersize=4, linewidth=1)
    axes.axhline(before, color="tab:gray", linestyle="--", label=f"held-out loss of the base: {before:.3f}")
    axes.axhline(after, color="tab:green", linestyle="--", label=f"held-out loss after tuning: {after:.3f}")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title("LoRA fine-tuning")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return directory.publish(out, CURVE, lambda path: figure.savefig(path, dpi=150))


def _smooth(values: tuple[float, ...], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    mean, norm, out = 0.0, 0.0, []
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out
