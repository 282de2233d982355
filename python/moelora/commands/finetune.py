"""`python -m moelora finetune`: LoRA fine-tuning of a mixture-of-experts language model, end to end."""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import moelora
from moelora import checkpoints
from moelora.commands import (
    data,
    default_model,
    directory,
    fingerprints,
    finite,
    lora,
    options,
    profiling,
    reloading,
    results,
    resuming,
    saving,
    showcase,
    signals,
    threads,
    training,
)
from moelora.errors import MoeloraError

EVALUATION_ROWS = 64
RELOAD_TOKENS = 64


@dataclass
class Start:
    """Where a run begins: at a verified checkpoint, with what it tells, or from nothing."""

    checkpoint: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    recorded: dict[str, Any] = field(default_factory=dict)  # options
    extended: bool = False


@dataclass
class Run:
    """A model with its adapter and its data, ready to train."""

    options: argparse.Namespace
    out: Path
    start: Start
    source: Path
    tokenizer: PreTrainedTokenizerBase
    train: Tensor  # [n, seq_length] int64
    held_out: Tensor  # [m, seq_length] int64
    model: PeftModel
    started: float  # time.perf_counter()
    fresh: list[str]  # keys of weights that were drawn
    made_from: dict[str, dict[str, str]]  # fingerprints


def main(explicit: dict[str, Any]) -> None:
    """Runs the command with the options that were given. MoeloraError tells the user what to mend."""
    _quiet()
    options.check_paths(explicit)
    out = Path(explicit.get("output", options.DEFAULTS["output"]))
    resume = bool(explicit.get("resume"))
    with directory.held(out, overwrite=bool(explicit.get("overwrite")), resume=resume) as found:
        start = _start(explicit, found) if resume else Start()
        if start is None:
            print(f"the run in {out} is finished: nothing is left to train (more --steps would extend it)")
        else:
            _finish(prepare(explicit, out, start))


def _start(explicit: dict[str, Any], found: directory.Found) -> Start | None:
    """Where to resume, or None if the run is finished and is not to be extended."""
    if found.checkpoint is None:
        if any(name in explicit for name in options.EXTENDABLE):
            raise MoeloraError("a finished run can only be extended from its last checkpoint, which is gone")
        return None
    facts = resuming.verify(found.checkpoint)
    recorded = resuming.options(found.checkpoint)
    extended = options.extended(explicit, recorded)
    return Start(found.checkpoint, facts, recorded, extended) if extended or not found.finished else None


def _finish(run: Run) -> None:
    summary = train(run)
    adapter = results.write_adapter(run.out, run.model, run.tokenizer)
    loss = summary["held_out_loss"]
    results.write_curve(run.out, summary["losses"], loss["base"], loss["tuned"])
    show(run, adapter, summary)
    summary["seconds"] = time.perf_counter() - run.started
    results.write_summary(run.out, summary)
    written = f"{results.ADAPTER}, {results.CURVE} and {results.SUMMARY}"
    print(f"wrote {written} to {run.out} in {summary['seconds']:.0f} s")


def prepare(explicit: dict[str, Any], out: Path, start: Start) -> Run:
    """Everything before the training: options, data, base model, adapter, operators. Cheap checks first."""
    started = time.perf_counter()
    chosen = options.settle(explicit, start.recorded)
    if chosen.threads:
        threads.check(chosen.threads)
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
    made_from = _made_from(chosen, source, documents)
    fingerprints.compare(start.facts.get("made_from", {}), made_from, start.checkpoint)
    model, fresh = _base(chosen, source)
    finite.check_weights(model, source)
    checkpoints.check_tokens(torch.cat(rows), model, source)
    checkpoints.check_runs(model, source)
    dtype = str(model.dtype).removeprefix("torch.")
    size = f"{checkpoints.count(model) / 1e6:.1f} M parameters"
    print(f"base     {source}: {type(model).__name__}, {size}, {dtype}")
    if fresh:
        print(f"fresh    {checkpoints.listed(fresh)}: drawn with --seed {chosen.seed}, in no file")
    print(f"data     {rows[0].numel():,} tokens to train on, {rows[1].numel():,} held out")
    set_seed(chosen.seed)
    adapted = lora.adapt(model, chosen.rank, chosen.alpha, chosen.projections, chosen.target_modules)
    report = moelora.enable(adapted)
    _set_threads(chosen, adapted, rows[0])
    trainable = checkpoints.count(adapted, trainable=True) / 1e6
    print(f"adapter  rank {chosen.rank}, alpha {chosen.alpha:g}, {trainable:.2f} M trainable parameters")
    print(f"\n{report}\n")
    return Run(chosen, out, start, source, tokenizer, *rows, adapted, started, fresh, made_from)


def train(run: Run) -> dict[str, Any]:
    """Trains the adapter, and tells how: losses, speed, and what the base made of the prompt."""
    trainer, progress = _trainer(run)
    profiler = profiling.Profiler(run.out, run.options.profile) if run.options.profile else None
    if profiler is not None:
        trainer.add_callback(profiler)
    try:
        before = training.held_out_loss(trainer)
        finite.check_held_out(before, 0, run.model)
        print(f"held-out loss before: {before:.3f}")
        base_sample = _sample(run, adapted=False) if run.options.sample else None
        set_seed(run.options.seed)
        with signals.deferred():
            trainer.go_on(run.start.checkpoint, run.start.facts.get("trained", False), run.start.extended)
        after = training.held_out_loss(trainer)
    finally:
        progress.close()
    finite.check_held_out(after, trainer.state.global_step, run.model)
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
    difference = reloading.reload(
        run.model, adapter, lambda: _base(run.options, run.source)[0], run.held_out[:1, :RELOAD_TOKENS]
    )
    summary["reload_difference"] = difference
    told = "all are zero" if difference is None else f"relative difference {difference:.0e}"
    print(f"adapter reloaded with plain PEFT: logits agree ({told})")


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


def _base(chosen: argparse.Namespace, source: Path) -> tuple[PreTrainedModel, list[str]]:
    """The base as it is on disk, and the keys of what `--fresh` let be drawn, the same each time."""
    return checkpoints.load(source, chosen.dtype, chosen.fresh, chosen.seed)


def _made_from(chosen: argparse.Namespace, source: Path, documents: list[str]) -> dict[str, dict[str, str]]:
    """Fingerprints, with which a resumed run is the same run."""
    texts = fingerprints.data(chosen.data) if chosen.data else {"python": fingerprints.texts(documents)}
    return {"data": texts, "base": fingerprints.base(source)}


def _set_threads(chosen: argparse.Namespace, model: PeftModel, rows: Tensor) -> None:
    """Settles the number of threads, so that a resumed run has the same and goes on to the bit."""
    if chosen.threads is None and model.device.type == "cpu":
        rows = rows[: 1 if chosen.gradient_checkpointing else chosen.batch_size]
        threads.choose(lambda: model(input_ids=rows, labels=rows).loss.backward())
        model.zero_grad()
    chosen.threads = torch.get_num_threads()


def _trainer(run: Run) -> tuple[training.TunedTrainer, training.Progress]:
    chosen = run.options
    # Only now, when all that could be wrong before a training has been found right.
    directory.remove(run.out, *([results.SUMMARY] if run.start.checkpoint else []))
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
    trainer.record = saving.Record(vars(chosen), {"made_from": run.made_from})
    trainer.add_callback(saving.Watch())
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
        "fresh": run.fresh,
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


def _quiet() -> None:
    """Only this command's own lines: the libraries' notes are about defaults that were chosen on purpose."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
