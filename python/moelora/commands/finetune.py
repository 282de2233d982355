"""`python -m moelora finetune`: LoRA fine-tuning of a mixture-of-experts language model, end to end."""

from __future__ import annotations

import argparse
import os
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
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import moelora
from moelora import checkpoints
from moelora.commands import (
    card,
    data,
    default_model,
    directory,
    files,
    fingerprints,
    finite,
    formats,
    lora,
    optimizers,
    options,
    packing,
    plan,
    profiling,
    reloading,
    results,
    resuming,
    saving,
    showcase,
    signals,
    threads,
    training,
    vetting,
)
from moelora.errors import MoeloraError
from moelora.standin import installed

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
    tokens: data.Tokens
    model: PeftModel
    started: float  # time.perf_counter()
    fresh: list[str]  # keys of weights that were drawn
    vetting: vetting.Vetting
    data: dict[str, str]  # fingerprints
    stamps: dict[str, list[int]]  # the base's files

    def made_from(self) -> dict[str, Any]:
        """What a resumed run is to find again, when all of the base has been read through."""
        return {
            "made_from": {"data": self.data, "base": self.vetting.digests()},
            "stamps": self.stamps,
        }

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return plan.steps(self.options, len(self.tokens.train))

    def batch(self, size: int | None = None) -> dict[str, Any]:
        """The first rows as the model gets them in training."""
        size = min(size or self.options.batch_size, len(self.tokens.train))
        rows = self.tokens.train.select(range(size))
        return data.batch(rows, self.tokenizer, self.tokens.bordered, self.model.device)


def main(explicit: dict[str, Any]) -> None:
    """Runs the command with the options that were given. MoeloraError tells the user what to mend."""
    _quiet()
    options.check_texts(explicit)
    out = Path(explicit.get("output", options.DEFAULTS["output"]))
    if explicit.get("dry_run"):
        prepare(explicit, out, Start(), vetting.Vetting())
        return
    resume = bool(explicit.get("resume"))
    reports = [directory.RUNNING[name] for name in explicit.get("report_to", []) if name in directory.RUNNING]
    names = (*directory.RESULTS, *reports)
    overwrite = bool(explicit.get("overwrite"))
    with directory.held(out, overwrite, resume, names) as found, vetting.Vetting() as vets:
        start = _start(explicit, found) if resume else Start()
        if start is None:
            print(f"the run in {out} is finished: nothing is left to train (more --steps would extend it)")
        else:
            _finish(prepare(explicit, out, start, vets))


def _start(explicit: dict[str, Any], found: directory.Found) -> Start | None:
    """Where to resume, or None if the run is finished and is not to be extended."""
    checkpoint = found.checkpoint
    if checkpoint is None:
        if any(name in explicit for name in options.EXTENDABLE):
            raise MoeloraError("a finished run can only be extended from its last checkpoint, which is gone")
        return None
    facts = resuming.verify(checkpoint)
    if facts["best"] and facts["best"] != facts["step"]:
        resuming.verify(checkpoint.with_name(f"checkpoint-{facts['best']}"))
    recorded = resuming.options(checkpoint)
    options.settle(explicit, recorded)  # what contradicts is told where nothing is left to do, too
    extended = options.extended(explicit, recorded)
    return Start(checkpoint, facts, recorded, extended) if extended or not found.finished else None


def _finish(run: Run) -> None:
    summary = train(run)
    adapter = results.write_adapter(run.out, run.model, run.tokenizer, card.text(run.source, summary))
    loss = summary["held_out_loss"]
    results.write_curve(run.out, summary["losses"], summary["evaluations"], loss["base"], loss["tuned"])
    results.write_config(run.out, vars(run.options))
    show(run, adapter, summary)
    summary["seconds"] = time.perf_counter() - run.started
    results.write_summary(run.out, summary)
    written = f"{results.ADAPTER}, {results.CURVE}, {results.CONFIG} and {results.SUMMARY}"
    print(f"wrote {written} to {run.out} in {summary['seconds']:.0f} s")
    print(f"try it with: python -m moelora chat {run.source} {adapter}")


def prepare(explicit: dict[str, Any], out: Path, start: Start, vets: vetting.Vetting) -> Run | None:
    """Everything before the training: options, data, base model, adapter, operators. Cheap checks first, and
    what reads all of the base beside the rest.

    None after a dry run.
    """
    started = time.perf_counter()
    chosen = options.settle(explicit, start.recorded)
    if chosen.threads:
        threads.check(chosen.threads)
        torch.set_num_threads(chosen.threads)
    training.check_reports(chosen.report_to)
    optimizers.check(chosen.optimizer)
    config, tokenizer = checkpoints.inspect(_given(chosen)) if chosen.model else default_model.inspect()
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and chosen.seq_length > limit:
        raise MoeloraError(f"--seq-length is {chosen.seq_length}, the model reads at most {limit} tokens")
    tokens = _tokens(chosen, tokenizer)
    _check_profile(chosen, plan.steps(chosen, len(tokens.train)))
    if chosen.dry_run:
        outline = checkpoints.outline(_given(chosen))[0] if chosen.model else default_model.outline()
        print(tokens.told())
        given = _given(chosen) if chosen.model else None
        with checkpoints.computing(given):
            told = plan.told(outline, config, chosen, tokens, given)
        print(told)
        return None
    source = _given(chosen) if chosen.model else _default(chosen)
    texts, stamps = _data(chosen), fingerprints.stamps(source)
    known = _same_as_before(start, source, texts, stamps)
    model, fresh = _base(chosen, source)
    vets.start(model, source, known)
    for rows in (tokens.train, tokens.held_out):
        data.check_ids(rows, tokenizer, model.get_input_embeddings().weight.shape[0], source)
    dtype = str(model.dtype).removeprefix("torch.")
    size = f"{checkpoints.count(model) / 1e6:.1f} M parameters"
    print(f"base     {source}: {type(model).__name__}, {size}, {dtype}")
    if fresh:
        print(f"fresh    {checkpoints.listed(fresh)}: drawn with --seed {chosen.seed}, in no file")
    print(tokens.told())
    set_seed(chosen.seed)
    targets = (chosen.target_modules, chosen.target_rank)
    adapted = lora.adapt(model, chosen.rank, chosen.alpha, chosen.projections, *targets)
    report = moelora.enable(adapted)
    checkpoints.check_runs(adapted, source)
    run = Run(chosen, out, start, source, tokenizer, tokens, adapted, started, fresh, vets, texts, stamps)
    if tokens.bordered:
        packing.check_borders(adapted, tokenizer)
    with vets.paused():
        _set_threads(run)
    trainable = checkpoints.count(adapted, trainable=True) / 1e6
    print(f"adapter  rank {chosen.rank}, alpha {chosen.alpha:g}, {trainable:.2f} M trainable parameters")
    print(f"plan     {plan.length(chosen, tokens)}; {chosen.threads} CPU threads")
    print(f"\n{report}\n")
    vets.check(vetting.PATIENCE)
    return run


def _tokens(chosen: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> data.Tokens:
    """The data's tokens, and a word on what it is."""
    data.load_template(chosen.chat_template, tokenizer)
    template = bool(tokenizer.chat_template)
    if chosen.data is None:
        texts = Dataset.from_dict({"text": data.language_reference()})
        rows = formats.Rows(formats.TEXT, texts, "Python's language reference")
    else:
        rows = formats.read(chosen.data, chosen.format, chosen.field, template)
        print(f"data     {rows.told()}")
    held_out = chosen.held_out
    if chosen.eval_data:
        held_out = formats.read(chosen.eval_data, chosen.format, chosen.field, template)
        if held_out.format != rows.format:
            raise MoeloraError(f"--eval-data is of format {held_out.format}, --data of {rows.format}")
        print(f"         to evaluate on: {held_out.told()}")
    return data.tokens(rows, tokenizer, chosen.seq_length, chosen.packing, chosen.loss, held_out, chosen.seed)


def _check_profile(chosen: argparse.Namespace, steps: int) -> None:
    if chosen.profile and steps < chosen.profile + profiling.WARMUP:
        raise MoeloraError(
            f"--profile is {chosen.profile}, expected at most {steps - profiling.WARMUP}: --steps is "
            f"{steps}, and {profiling.WARMUP} steps go before the measured ones"
        )


def train(run: Run) -> dict[str, Any]:
    """Trains the adapter, and tells how: losses, speed, and what the base made of the prompt.

    What the base does is looked at when the training is over: nobody waits for it before the first step.
    """
    trainer, progress = _trainer(run)
    if training.hides_overflow(run.model):
        with run.model.disable_adapter(), torch.no_grad():
            logits = run.model(input_ids=_first_ids(run).to(run.model.device)).logits
        finite.check_logits(logits, run.model, "before anything was trained")
    profiler = profiling.Profiler(run.out, run.options.profile) if run.options.profile else None
    if profiler is not None:
        trainer.add_callback(profiler)
    try:
        set_seed(run.options.seed)
        with signals.deferred():
            trainer.go_on(run.start.checkpoint, run.start.facts.get("trained", False), run.start.extended)
        best = training.best_checkpoint(trainer.state, run.out)
        if best is not None:
            print(
                f"the lowest held-out loss was at step {trainer.state.best_global_step}: its adapter is kept"
            )
            run.model.load_adapter(str(best), run.model.active_adapter, is_trainable=True)
        _check_trained(run, steps=len(progress.seconds))
        with run.model.disable_adapter():
            before = training.held_out_loss(trainer, "base")
        finite.check_held_out(before, 0, run.model)
        print(f"held-out loss before: {before:.3f}")
        after = training.held_out_loss(trainer)
        finite.check_held_out(after, trainer.state.global_step, run.model)
        print(f"held-out loss after:  {after:.3f}")
    finally:
        progress.close()
    base_sample = _sample(run, adapted=False) if run.options.sample else None
    if profiler is not None and profiler.table is not None:
        print(profiler.table)
    return {
        **_facts(run),
        "held_out_loss": {"base": before, "tuned": after},
        "losses": _logged(trainer, "loss"),
        "evaluations": _logged(trainer, "eval_loss"),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "seconds_to_first_step": progress.waited,
        "step_seconds": statistics.median(progress.seconds) if progress.seconds else None,
        "tokens_per_second": progress.tokens_per_second(len(progress.seconds)),
        "base_sample": base_sample,
    }


def _logged(trainer: training.TunedTrainer, name: str) -> list[tuple[int, float]]:
    """(step, value) of what was logged in the training."""
    history = trainer.state.log_history
    return [(entry["step"], entry[name]) for entry in history if name in entry and entry["step"]]


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
        summary["race"] = showcase.race(run.model, run.batch(), run.options.compare)
        print(_told(summary["race"]))
    how = "PEFT on packed experts" if any(installed(run.model)) else "plain PEFT"
    difference = reloading.reload(
        run.model, adapter, lambda: _base(run.options, run.source)[0], _first_ids(run)
    )
    summary["reload_difference"] = difference
    told = "all are zero" if difference is None else f"relative difference {difference:.0e}"
    print(f"adapter reloaded with {how}: logits agree ({told})")


def _first_ids(run: Run) -> Tensor:
    """[1, n] int64 of the held-out data."""
    return torch.tensor([run.tokens.held_out[0]["input_ids"][:RELOAD_TOKENS]])


def _told(race: dict[str, Any]) -> str:
    if "error" in race:
        return f"no comparison: transformers' experts + PEFT cannot run this model ({race['error']})"
    ours, theirs = race["operators_seconds"] * 1e3, race["transformers_peft_seconds"] * 1e3
    return (
        f"forward + backward of {race['tokens']} tokens: {ours:.0f} ms on the operators, {theirs:.0f} ms "
        f"with transformers' experts + PEFT ({race['speedup']:.1f}x, medians of {race['pairs']})"
    )


def _given(chosen: argparse.Namespace) -> Path:
    return Path(os.path.abspath(chosen.model))  # PEFT writes it into the adapter


def _default(chosen: argparse.Namespace) -> Path:
    cache = Path(os.path.abspath(chosen.cache_dir)) if chosen.cache_dir else default_model.default_cache()
    return default_model.ensure(cache, fixed_threads=chosen.threads is not None)


def _set_threads(run: Run) -> None:
    """Settles the number of threads, so that a resumed run has the same and goes on to the bit."""
    if run.options.threads is None and run.model.device.type == "cpu":
        inputs = run.batch(1)
        inputs.pop("labels")
        without_head = run.model.get_base_model().base_model

        @torch.no_grad()  # a backward keeps more than the training may have room for
        def forward() -> None:
            without_head(**inputs, use_cache=False)

        threads.choose(threads.piece(run.model, forward))
    run.options.threads = torch.get_num_threads()


def _base(chosen: argparse.Namespace, source: Path) -> tuple[PreTrainedModel, list[str]]:
    """The base as it is on disk, and the keys of what `--fresh` let be drawn, the same each time."""
    return checkpoints.load(source, chosen.dtype, chosen.fresh, chosen.seed)


def _data(chosen: argparse.Namespace) -> dict[str, str]:
    """Fingerprints of the data."""
    if not chosen.data:
        return {"python": fingerprints.texts(data.language_reference())}
    found, _ = files.find([*chosen.data, *(chosen.eval_data or [])], chosen.format == formats.TEXT)
    template = [Path(chosen.chat_template)] if chosen.chat_template else []
    return fingerprints.files([*(path for path, _ in found), *template])


def _same_as_before(
    start: Start, source: Path, texts: dict[str, str], stamps: dict[str, list[int]]
) -> dict[str, str]:
    """The fingerprints of the base's files that are known, none at a run's beginning.

    Raises: MoeloraError if a run that is resumed was started with other ones, or with other data.
    """
    recorded = start.facts.get("made_from")
    if recorded is None:
        return {}
    base = fingerprints.base(source, recorded["base"], start.facts.get("stamps", {}), stamps)
    fingerprints.compare(recorded, {"data": texts, "base": base}, start.checkpoint)
    return base


def _trainer(run: Run) -> tuple[training.TunedTrainer, training.Progress]:
    chosen = run.options
    # Only now, when all that could be wrong before a training has been found right.
    directory.remove(run.out, *([results.SUMMARY] if run.start.checkpoint else []))
    for name in chosen.report_to:
        if name in directory.RUNNING:
            directory.claim(run.out, directory.RUNNING[name])
    trainer, progress = training.trainer(
        run.model,
        run.tokenizer,
        run.tokens,
        run.out,
        "tuning",
        chosen.eval_rows,
        max_steps=run.steps,
        per_device_train_batch_size=chosen.batch_size,
        per_device_eval_batch_size=chosen.batch_size,
        gradient_accumulation_steps=chosen.grad_accumulation,
        gradient_checkpointing=chosen.gradient_checkpointing,
        optim=optimizers.NAMES[chosen.optimizer],
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=chosen.scheduler,
        warmup_steps=plan.warmup(chosen.warmup, run.steps),
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.max_grad_norm,
        seed=chosen.seed,
        **training.evaluating(chosen.eval_every, chosen.keep_best, chosen.early_stopping, chosen.save_every),
        report_to=[name for name in chosen.report_to if name != training.JSONL],
    )
    trainer.steps_in_backward = chosen.step_in_backward
    if chosen.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(chosen.early_stopping))
    if training.JSONL in chosen.report_to:
        trainer.add_callback(training.JsonLines(run.out / results.LOG))
    trainer.record = saving.Record(vars(chosen), run.made_from)
    trainer.add_callback(saving.Watch())
    trainer.add_callback(vetting.Heed(run.vetting))
    return trainer, progress


def _sample(run: Run, adapted: bool) -> str:
    with nullcontext() if adapted else run.model.disable_adapter():
        return showcase.sample(run.model, run.tokenizer, _prompt(run), run.options.sample, run.options.seed)


def _prompt(run: Run) -> Tensor:
    """[n] int64: what to continue."""
    text = run.options.prompt
    if not text:
        ids = data.prompt(run.tokens.held_out[0], 64)
        if data.IGNORED in run.tokens.held_out[0]["labels"]:
            return torch.tensor(ids)
        text = run.tokenizer.decode(ids)
        text = text[: re.search(r"\s*\S*$", text).start()] or text  # up to its last whole word
    return torch.tensor(run.tokenizer(text)["input_ids"], dtype=torch.int64)


def _facts(run: Run) -> dict[str, Any]:
    return {
        "base": run.source,
        "fresh": run.fresh,
        "options": vars(run.options),
        "train_tokens": data.count(run.tokens.train),
        "held_out_tokens": data.count(run.tokens.held_out),
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
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
