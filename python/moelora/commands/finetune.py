"""`python -m moelora finetune`: LoRA fine-tuning of a mixture-of-experts language model, end to end."""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import statistics
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

import moelora
from moelora import checkpoints
from moelora.commands import (
    data,
    default_model,
    lora,
    options,
    profiling,
    results,
    showcase,
    threads,
    training,
)
from moelora.errors import MoeloraError, writing

OPTIONS = "options.json"
EVALUATION_ROWS = 64
RELOAD_TOKENS = 64


@dataclass
class Run:
    """A model with its adapter and its data, ready to train."""

    options: argparse.Namespace
    out: Path
    checkpoint: Path | None  # to resume from
    source: Path
    tokenizer: PreTrainedTokenizerBase
    train: Tensor  # [n, seq_length] int64
    held_out: Tensor  # [m, seq_length] int64
    model: PeftModel
    started: float  # time.perf_counter()


def main(explicit: dict[str, Any]) -> None:
    """Runs the command with the options that were given. MoeloraError tells the user what to mend."""
    _quiet()
    run = prepare(explicit)
    existed = run.out.exists()
    try:
        _finish(run)
    except BaseException:
        if not existed:
            with suppress(OSError):
                run.out.rmdir()  # only if nothing worth keeping came into it
        raise


def _finish(run: Run) -> None:
    summary = train(run)
    adapter = results.write_adapter(run.out, run.model, run.tokenizer)
    loss = summary["held_out_loss"]
    results.write_curve(run.out, summary["losses"], loss["base"], loss["tuned"])
    show(run, adapter, summary)
    summary["seconds"] = time.perf_counter() - run.started
    results.write_summary(run.out, summary)
    _forget_checkpoints(run.out)
    written = f"{results.ADAPTER}, {results.CURVE} and {results.SUMMARY}"
    print(f"wrote {written} to {run.out} in {summary['seconds']:.0f} s")


def prepare(explicit: dict[str, Any]) -> Run:
    """Everything before the training: options, data, base model, adapter, operators. Cheap checks first."""
    started = time.perf_counter()
    out = Path(explicit.get("output", options.DEFAULTS["output"]))
    checkpoint = _checkpoint(out, explicit)
    chosen = options.settle(explicit, _recorded(checkpoint) if checkpoint else {})
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if chosen.profile and chosen.steps < chosen.profile + profiling.WARMUP:
        raise MoeloraError(
            f"--profile is {chosen.profile}, expected at most {chosen.steps - profiling.WARMUP}: --steps is "
            f"{chosen.steps}, and {profiling.WARMUP} steps go before the measured ones"
        )
    documents = data.read_files(chosen.data, chosen.field) if chosen.data else data.language_reference()
    source = _source(chosen)
    config, tokenizer = checkpoints.inspect(source)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and chosen.seq_length > limit:
        raise MoeloraError(f"--seq-length is {chosen.seq_length}, the model reads at most {limit} tokens")
    rows = [
        data.blocks(tokenizer, texts, chosen.seq_length, f"{what} text")
        for what, texts in zip(
            ("training", "held-out"), data.split(documents, chosen.held_out, chosen.seed), strict=True
        )
    ]
    model = checkpoints.load(source, chosen.dtype)
    dtype = str(model.dtype).removeprefix("torch.")
    size = f"{checkpoints.count(model) / 1e6:.1f} M parameters"
    print(f"base     {source}: {type(model).__name__}, {size}, {dtype}")
    print(f"data     {rows[0].numel():,} tokens to train on, {rows[1].numel():,} held out")
    set_seed(chosen.seed)
    adapted = lora.adapt(model, chosen.rank, chosen.alpha, chosen.projections, chosen.target_modules)
    report = moelora.enable(adapted)
    _set_threads(chosen, adapted, rows[0])
    trainable = checkpoints.count(adapted, trainable=True) / 1e6
    print(f"adapter  rank {chosen.rank}, alpha {chosen.alpha:g}, {trainable:.2f} M trainable parameters")
    print(f"\n{report}\n")
    return Run(chosen, out, checkpoint, source, tokenizer, *rows, adapted, started)


def train(run: Run) -> dict[str, Any]:
    """Trains the adapter, and tells how: losses, speed, and what the base made of the prompt."""
    trainer, progress = _trainer(run)
    profiler = profiling.Profiler(run.out, run.options.profile) if run.options.profile else None
    if profiler is not None:
        trainer.add_callback(profiler)
    try:
        before = training.held_out_loss(trainer)
        print(f"held-out loss before: {before:.3f}")
        base_sample = _sample(run, adapted=False) if run.options.sample else None
        set_seed(run.options.seed)
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        after = training.held_out_loss(trainer)
    finally:
        progress.close()
    _check_trained(run, steps=len(progress.seconds))
    print(f"held-out loss after:  {after:.3f}")
    if profiler is not None and profiler.table is not None:
        print(profiler.table)
    return {
        **_facts(run),
        "held_out_loss": {"base": before, "tuned": after},
        "losses": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "step_seconds": statistics.median(progress.seconds) if progress.seconds else None,
        "tokens_per_second": progress.tokens_per_second(len(progress.seconds)),
        "base_sample": base_sample,
    }


def _check_trained(run: Run, steps: int) -> None:
    """A run must not look like success when nothing was learned."""
    untrained = moelora.report(run.model).untrained
    if steps and untrained:
        raise MoeloraError(
            f"{len(untrained)} adapted parameters, {untrained[0]} first, got no gradient in {steps} steps: "
            "their layers are not part of the loss, or all their gradients are zero"
        )


def show(run: Run, adapter: Path, summary: dict[str, Any]) -> None:
    """The continuation, the race and the reload: printed, and added to `summary`."""
    if run.options.sample:
        summary["tuned_sample"] = _sample(run, adapted=True)
        summary["prompt"] = run.tokenizer.decode(_prompt(run))
        for title in ("prompt", "base_sample", "tuned_sample"):
            text = summary[title].strip("\n").replace("\n", "\n       │ ")
            print(f"{title.removesuffix('_sample'):<7}│ {text}")
    if run.options.compare:
        summary["race"] = showcase.race(run.model, run.train[: run.options.batch_size], run.options.compare)
        print(_told(summary["race"]))
    difference = showcase.reload(run.model, adapter, run.held_out[:1, :RELOAD_TOKENS])
    summary["reload_difference"] = difference
    print(f"adapter reloaded with plain PEFT: logits agree (relative difference {difference:.0e})")


def _told(race: dict[str, Any]) -> str:
    if "error" in race:
        return f"no comparison: transformers' experts + PEFT cannot run this model ({race['error']})"
    ours, theirs = race["operators_seconds"] * 1e3, race["transformers_peft_seconds"] * 1e3
    return (
        f"forward + backward of {race['tokens']} tokens: {ours:.0f} ms on the operators, {theirs:.0f} ms "
        f"with transformers' experts + PEFT ({race['speedup']:.1f}x, medians of {race['pairs']})"
    )


def _source(chosen: argparse.Namespace) -> Path:
    if chosen.model:
        return Path(chosen.model)
    cache = Path(chosen.cache_dir) if chosen.cache_dir else default_model.default_cache()
    return default_model.ensure(cache, fixed_threads=chosen.threads is not None)


def _set_threads(chosen: argparse.Namespace, model: PeftModel, rows: Tensor) -> None:
    """Settles the number of threads, so that a resumed run has the same and goes on to the bit."""
    if chosen.threads is None and chosen.model is None:
        rows = rows[: chosen.batch_size]
        threads.choose(lambda: model(input_ids=rows, labels=rows).loss.backward())
        model.zero_grad()
    chosen.threads = torch.get_num_threads()


def _checkpoint(out: Path, explicit: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from; complains where the output directory does not fit the command."""
    if out.exists() and not out.is_dir():
        raise MoeloraError(f"--output {out} is a file, expected a directory")
    found = training.last_checkpoint(out)
    if explicit.get("resume"):
        if found is None:
            raise MoeloraError(f"nothing to resume in {out}: expected a checkpoint of an unfinished run")
        return found
    if found is not None and not explicit.get("overwrite"):
        raise MoeloraError(
            f"{out} holds an unfinished run ({found.name}): --resume goes on with it, --overwrite starts anew"
        )
    return None


def _recorded(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / OPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MoeloraError(
            f"{checkpoint} cannot be resumed: expected its options in {OPTIONS}, got {error}"
        ) from None


def _trainer(run: Run) -> tuple[training.TunedTrainer, training.Progress]:
    chosen = run.options
    if chosen.overwrite:
        _forget_checkpoints(run.out)
    with writing(run.out):
        run.out.mkdir(parents=True, exist_ok=True)
    trainer, progress = training.trainer(
        run.model,
        run.tokenizer,
        data.dataset(run.train),
        data.dataset(data.spread(run.held_out, EVALUATION_ROWS)),
        run.out,
        "tuning",
        max_steps=chosen.steps,
        per_device_train_batch_size=chosen.batch_size,
        per_device_eval_batch_size=chosen.batch_size,
        gradient_accumulation_steps=chosen.grad_accumulation,
        gradient_checkpointing=chosen.gradient_checkpointing,
        learning_rate=chosen.learning_rate,
        warmup_steps=max(1, chosen.steps // 20),
        save_steps=chosen.save_every,
        seed=chosen.seed,
    )
    text = json.dumps(vars(chosen), indent=2)
    trainer.finish_checkpoint = lambda path: (path / OPTIONS).write_text(text, encoding="utf-8")
    return trainer, progress


def _sample(run: Run, adapted: bool) -> str:
    with nullcontext() if adapted else run.model.disable_adapter():
        return showcase.sample(run.model, run.tokenizer, _prompt(run), run.options.sample, run.options.seed)


def _prompt(run: Run) -> Tensor:
    """[n] int64: what to continue."""
    text = run.options.prompt
    if not text:
        text = run.tokenizer.decode(run.held_out[0, : min(64, run.held_out.shape[1] // 2)])
        text = text[: re.search(r"\s*\S*$", text).start()] or text  # up to its last whole word
    return torch.tensor(run.tokenizer(text)["input_ids"], dtype=torch.int64)


def _facts(run: Run) -> dict[str, Any]:
    return {
        "base": run.source,
        "options": vars(run.options),
        "train_tokens": run.train.numel(),
        "held_out_tokens": run.held_out.numel(),
        "trainable_parameters": checkpoints.count(run.model, trainable=True),
        "experts": moelora.report(run.model).to_dict(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }


def _forget_checkpoints(out: Path) -> None:
    staging = out / training.STAGING
    for path in out.glob("checkpoint-*"):
        shutil.rmtree(staging, ignore_errors=True)
        path.rename(staging)  # so that an interrupted removal leaves nothing that looks like a checkpoint
    shutil.rmtree(staging, ignore_errors=True)


def _quiet() -> None:
    """Only this command's own lines: the libraries' notes are about defaults that were chosen on purpose."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
