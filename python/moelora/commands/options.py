"""The command line's options: what they are called, what they default to and what they accept."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from moelora import MoeloraError
from moelora.commands import checkpoint_options


def _number(
    kind: type, low: float, description: str, above: bool = False, high: int = 2**31 - 1
) -> Callable[[str], Any]:
    """An argparse type: a finite number of `kind` that is at least `low`, or `above` it; at most `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value > high and kind is int:
            raise argparse.ArgumentTypeError(f"expected {description} and at most {high}, got {text!r}")
        if not (math.isfinite(value) and (value > low if above else value >= low)):
            raise argparse.ArgumentTypeError(f"expected {description}, got {text!r}")
        return value

    return parse


_COUNT = _number(int, 1, "a whole number of at least 1")
_FROM_ZERO = _number(int, 0, "a whole number of at least 0")
_SEED = _number(int, 0, "a whole number of at least 0", high=2**32 - 1)  # as far as numpy goes
_FROM_TWO = _number(int, 2, "a whole number of at least 2")
_POSITIVE = _number(float, 0.0, "a number above 0", above=True)
_NOT_NEGATIVE = _number(float, 0.0, "a number of at least 0")
LEAST_TEMPERATURE = 1e-3
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "inverse_sqrt")


def _temperature(text: str) -> float:
    value = _NOT_NEGATIVE(text)
    if 0 < value < LEAST_TEMPERATURE:  # logits over it overflow
        raise argparse.ArgumentTypeError(
            f"expected 0 or a number of at least {LEAST_TEMPERATURE:g}, got {text!r}"
        )
    return value


def _fraction(text: str) -> float:
    value = _POSITIVE(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction between 0 and 1, got {text!r}")
    return value


class Option(NamedTuple):
    """One option; a default of None is explained in its help text."""

    flag: str
    default: Any
    help: str
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        return self.flag[2:].replace("-", "_")


def _option(flag: str, default: Any, help: str, metavar: str | None = None, **keywords: Any) -> Option:
    return Option(flag, default, help, keywords | ({"metavar": metavar} if metavar else {}))


def _switch(flag: str, help: str, negative: bool = False) -> Option:
    """`negative`: there is a --no- form, too, which a command line needs against a --config."""
    action = argparse.BooleanOptionalAction if negative else "store_true"
    return Option(flag, False, help, {"action": action})


_FINETUNE: dict[str, list[Option]] = {
    "model and data": [
        _option(
            "--model",
            None,
            "a local transformers checkpoint with safetensors (default: a small byte-level Qwen3-MoE, "
            "pretrained on first use on Python's standard library)",
            "DIR",
        ),
        _option(
            "--data",
            None,
            "files or directories of .jsonl, .json, .csv, .tsv, .parquet or plain text, each also with .gz "
            "(default: Python's language reference)",
            "PATH",
            nargs="+",
        ),
        _option(
            "--format",
            None,
            "what the rows are: text; chat (messages); prompt with completion; instruction, input and output "
            "(default: recognised by the fields)",
            choices=["text", "chat", "prompt-completion", "instruction"],
        ),
        _option("--field", None, "the field of a row that holds its text (default: text)", "NAME"),
        _option("--held-out", 0.1, "share of the data kept for evaluation", "FRACTION", type=_fraction),
        _option("--eval-data", None, "data for evaluation, instead of a share", "PATH", nargs="+"),
        _option(
            "--loss",
            None,
            "what the loss counts: all tokens, or answers, that is completions and assistant's turns "
            "(default: answers, where the data has some)",
            choices=["all", "answers"],
        ),
        _option(
            "--packing",
            None,
            "none: a text a row; wrapped: texts end to end, each seeing the one before; bfd: whole texts "
            "side by side, none seeing another; bfd_split: the same, long ones cut in pieces, not off "
            "(default: wrapped for plain text, else none)",
            choices=["none", "wrapped", "bfd", "bfd_split"],
        ),
        _option(
            "--chat-template",
            None,
            "a Jinja file for conversations, instead of the tokenizer's template",
            "FILE",
        ),
        _option(
            "--dtype",
            "auto",
            "the frozen model's dtype; auto is the checkpoint's. LoRA parameters are always float32",
            choices=["auto", "float32", "bfloat16", "float16"],
        ),
        _option(
            "--fresh",
            [],
            "keys of weights, as patterns such as 'lm_head.*', that the checkpoint may lack or have in "
            "another shape (then drawn at random) or may have beside the model's (then left out)",
            "KEY",
            nargs="+",
        ),
        _option(
            "--cache-dir",
            None,
            "where the pretrained default model is kept (default: moelora in the Hugging Face assets cache)",
            "DIR",
        ),
    ],
    "adapter": [
        _option("--rank", 16, "LoRA rank", "R", type=_COUNT),
        _option(
            "--alpha",
            None,
            "LoRA alpha; scaling is alpha / rank (default: twice the rank)",
            "A",
            type=_POSITIVE,
        ),
        _option(
            "--projections", "both", "which expert projections to adapt", choices=["both", "gate_up", "down"]
        ),
        _option(
            "--target-modules",
            [],
            "linear layers to adapt beside the experts, such as q_proj v_proj (default: none)",
            "NAME",
            nargs="+",
        ),
        _option(
            "--target-rank",
            None,
            "LoRA rank of --target-modules, with the experts' scaling (default: --rank)",
            "R",
            type=_COUNT,
        ),
    ],
    "training": [
        _option("--steps", 120, "optimizer steps", "N", type=_COUNT),
        _option("--epochs", None, "passes over the data, instead of --steps", "N", type=_POSITIVE),
        _option(
            "--learning-rate",
            None,
            "peak learning rate (default: 2e-4; 5e-3 for the small default model)",
            "LR",
            type=_POSITIVE,
        ),
        _option(
            "--warmup",
            0.05,
            "steps in which the rate rises: their share of all if below 1, else their number",
            "N",
            type=_NOT_NEGATIVE,
        ),
        _option("--scheduler", "cosine", "how the rate goes on from its peak", choices=SCHEDULERS),
        _option(
            "--optimizer",
            "adamw",
            "adamw_8bit keeps its moments in 8 bits, a quarter of their memory; it is bitsandbytes'",
            choices=["adamw", "adamw_8bit"],
        ),
        _switch(
            "--step-in-backward",
            "take each parameter's step when its gradient is there, and drop the gradient: less memory. Not "
            "with --grad-accumulation or --max-grad-norm, which is 0 then",
            negative=True,
        ),
        _option("--weight-decay", 0.0, "AdamW's weight decay", "W", type=_NOT_NEGATIVE),
        _option(
            "--max-grad-norm",
            None,
            "gradients are clipped to this norm; 0 for never (default: 1; 0 with --step-in-backward)",
            "G",
            type=_NOT_NEGATIVE,
        ),
        _option("--seq-length", 256, "tokens in a sequence", "N", type=_FROM_TWO),
        _option("--batch-size", 8, "sequences in a forward pass", "N", type=_COUNT),
        _option("--grad-accumulation", 1, "forward passes in an optimizer step", "N", type=_COUNT),
        _switch(
            "--gradient-checkpointing",
            "recompute activations in the backward: less memory, more time",
            negative=True,
        ),
        _option(
            "--threads",
            None,
            "CPU threads (default: all, half of them or one, whichever measures fastest)",
            "N",
            type=_COUNT,
        ),
        _option("--seed", 0, "seed of the data split, the order and the adapter", "N", type=_SEED),
    ],
    "evaluation": [
        _option(
            "--eval-every",
            0,
            "steps between evaluations; 0: only at the end, of the base and the adapter",
            "N",
            type=_FROM_ZERO,
        ),
        _option(
            "--eval-rows", 64, "held-out rows, evenly spaced, that an evaluation takes", "N", type=_COUNT
        ),
        _switch(
            "--keep-best",
            "end with the adapter of the lowest held-out loss; needs --eval-every, and checkpoints go by it",
            negative=True,
        ),
        _option(
            "--early-stopping",
            0,
            "stop after N evaluations in a row without a lower loss, with --keep-best; 0 for never",
            "N",
            type=_FROM_ZERO,
        ),
        _option(
            "--report-to",
            [],
            "where the log goes: jsonl (log.jsonl in the output directory), tensorboard, wandb and what else "
            "transformers knows; none for nothing, also where a resumed run had one (default: none)",
            "NAME",
            nargs="+",
        ),
    ],
    "output": [
        _option("--output", "out", "where the adapter, checkpoints, loss curve and summary go", "DIR"),
        _option("--save-every", 25, "steps between checkpoints", "N", type=_COUNT),
        _switch(
            "--resume",
            "go on from the last checkpoint in the output directory, with its options; with more --steps or "
            "--epochs, extend the run",
        ),
        _switch("--overwrite", "start anew where an earlier run is, removing what it wrote"),
        _option(
            "--profile",
            0,
            "steps to measure with torch.profiler: a trace and a table of the slowest operators; 0 for none",
            "N",
            type=_FROM_ZERO,
        ),
    ],
    "the run itself": [
        _option(
            "--config",
            None,
            "options in a YAML file, such as the config.yaml that a run writes; those beside it go first",
            "FILE",
        ),
        _switch("--dry-run", "print what would happen: tokens, steps, memory, time; and stop"),
    ],
    "what is shown at the end": [
        _option(
            "--compare",
            5,
            "steps to time beside transformers' own experts + PEFT; 0 for none",
            "N",
            type=_FROM_ZERO,
        ),
        _option("--sample", 160, "tokens of sampled continuation; 0 for none", "N", type=_FROM_ZERO),
        _option("--prompt", None, "what to continue (default: the start of the held-out text)", "TEXT"),
    ],
}

# These may grow when a run is resumed: it is extended.
EXTENDABLE = ("steps", "epochs")

# These are of one call: a resumed run has its own.
OF_A_CALL = ("output", "resume", "overwrite", "profile", "dry_run")

# These may differ when a run is resumed: they do not touch what is trained.
FREE_ON_RESUME = (*OF_A_CALL, "cache_dir", "save_every", "compare", "sample", "prompt", "report_to")

DEFAULTS: dict[str, Any] = {option.name: option.default for group in _FINETUNE.values() for option in group}


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are a single line."""

    def error(self, message: str) -> None:
        self.exit(2, f"moelora: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The parser of `python -m moelora`. Options that are not given are absent from its result."""
    top = _Parser(prog="python -m moelora", description="LoRA fine-tuning of mixture-of-experts models.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    finetune = commands.add_parser(
        "finetune",
        argument_default=argparse.SUPPRESS,
        help="tune a model's experts on text and write a PEFT adapter",
        description="Tunes the experts of a mixture-of-experts language model on text with LoRA, and writes "
        "an adapter in PEFT's format, a loss curve and a summary. Without options it needs no download: it "
        "tunes a small model on text that comes with Python, in a few minutes on two cores.",
    )
    _add_inspect(commands)
    _add_chat(commands)
    checkpoint_options.add(commands)
    commands.add_parser(
        "models",
        help="list the experts classes of the installed transformers that run on the operators",
        description="Prints, in Markdown, each experts class of the installed transformers, its layout and "
        "activation, and whether it runs on the operators.",
    )
    for title, options in _FINETUNE.items():
        group = finetune.add_argument_group(title)
        for option in options:
            shown = option.default is not None and option.default is not False and option.default != []
            text = option.help + (f" (default: {option.default})" if shown else "")
            group.add_argument(option.flag, help=text, default=argparse.SUPPRESS, **option.keywords)
    return top


# Options of `finetune` that decide how much memory it takes.
_INSPECTED = (
    *("rank", "projections", "target_modules", "target_rank", "seq_length", "optimizer", "step_in_backward"),
    "gradient_checkpointing",
)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what experts a checkpoint has, what LoRA on them would train, and what that costs here",
        description="Reads a checkpoint's configuration and the headers of its weight files. The time of a "
        "step is extrapolated from a measurement of some seconds, with random weights.",
    )
    inspect.add_argument("model_dir", metavar="MODEL_DIR", help="a local transformers checkpoint")
    for option in (option for group in _FINETUNE.values() for option in group):
        if option.name in _INSPECTED:
            shown = f" (default: {option.default})" if option.default else ""
            inspect.add_argument(
                option.flag, help=option.help + shown, default=option.default, **option.keywords
            )
    text = "tokens in a step, all sequences together (default: 2048)"
    inspect.add_argument("--tokens", metavar="N", type=_COUNT, default=2048, help=text)
    text = "leave the time of a step out"
    inspect.add_argument("--no-measure", dest="measure", action="store_false", help=text)


def _add_chat(commands: argparse._SubParsersAction) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk to a model with an adapter",
        description="Answers each line of the standard input, as a conversation if the tokenizer has a chat "
        "template, else by continuing it.",
    )
    chat.add_argument("model_dir", metavar="MODEL_DIR", help="a local transformers checkpoint")
    chat.add_argument("adapter", metavar="ADAPTER", nargs="?", help="an adapter of it (default: none)")
    for flag, default, kind, text in (
        ("--tokens", 200, _COUNT, "tokens in an answer, at most"),
        ("--temperature", 0.8, _temperature, "0 takes the likeliest token each time"),
        ("--seed", 0, _FROM_ZERO, "seed of the sampling"),
    ):
        chat.add_argument(flag, metavar="N", type=kind, default=default, help=f"{text} (default: {default})")
    chat.add_argument("--system", metavar="TEXT", help="a system message (default: none)")
    dtype = next(o for group in _FINETUNE.values() for o in group if o.name == "dtype")
    chat.add_argument("--dtype", help="the model's dtype", default=dtype.default, **dtype.keywords)


def check_texts(explicit: dict[str, Any]) -> None:
    """Raises: MoeloraError for a path that is empty, as an unset variable makes it, or what is no text."""
    for name in ("model", "data", "eval_data", "output", "cache_dir", "chat_template"):
        value = explicit.get(name)
        paths = value if isinstance(value, list) else [value]
        if any(path is not None and not str(path).strip() for path in paths):
            flag = "--" + name.replace("_", "-")
            raise MoeloraError(f"{flag} is empty, expected a path (leave {flag} out for the default)")
    for name in ("prompt", "field"):
        check_text(explicit.get(name), f"--{name}")


def check_text(text: str | None, what: str) -> None:
    """Raises: MoeloraError for text with bytes in it that are no UTF-8."""
    if any(0xD800 <= ord(character) < 0xE000 for character in text or ""):
        raise MoeloraError(f"{what} is no UTF-8 text")


def check_places(explicit: dict[str, Any]) -> None:
    """Raises: MoeloraError for a command's argument that is empty, as an unset variable makes it: it would
    stand for the current directory.
    """
    for name in ("model_dir", "adapter", "out", "name"):
        value = explicit.get(name)
        if isinstance(value, str) and not value.strip():
            raise MoeloraError(f"{name.upper()} is empty, expected a path")


def _words(value: Any) -> str:
    """An option's value as it stands on a command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def extended(explicit: dict[str, Any], recorded: dict[str, Any]) -> bool:
    """Whether a resumed run is to train longer than it was started to."""
    pairs = [(explicit.get(name), recorded.get(name)) for name in EXTENDABLE]
    return any(now is not None and before is not None and now > before for now, before in pairs)


def settle(explicit: dict[str, Any], recorded: dict[str, Any] | None = None) -> argparse.Namespace:
    """The options of a run: what was given, then what a resumed run was started with, then the defaults.

    Raises: MoeloraError if an option that decides the training differs from the recorded one.
    """
    recorded = recorded or {}
    for name, value in explicit.items():
        if name in recorded and name not in FREE_ON_RESUME and recorded[name] != value:
            if extended({name: value}, recorded):
                continue
            flag = "--" + name.replace("_", "-")
            unset = recorded[name] is None or recorded[name] == []
            before = f"without {flag}" if unset else f"with {flag} {_words(recorded[name])}"
            raise MoeloraError(
                f"the run to resume was started {before}, got {_words(value)}: leave {flag} out"
            )
    kept = {name: value for name, value in recorded.items() if name in DEFAULTS and name not in OF_A_CALL}
    options = argparse.Namespace(**{**DEFAULTS, **kept, **explicit})
    _check(options, {**kept, **explicit})
    if options.report_to == ["none"]:
        options.report_to = []
    if options.alpha is None:
        options.alpha = 2.0 * options.rank
    if options.max_grad_norm is None:
        options.max_grad_norm = 0.0 if options.step_in_backward else 1.0
    if options.learning_rate is None:
        options.learning_rate = 2e-4 if options.model else 5e-3
    return options


def _check(options: argparse.Namespace, given: dict[str, Any]) -> None:
    """Complains about options that contradict each other; of steps and epochs, one is left."""
    if options.epochs is not None:
        if given.get("steps") is not None:
            raise MoeloraError("--steps and --epochs both say how long: expected one of them, got both")
        options.steps = None
    if options.early_stopping and not options.keep_best:
        raise MoeloraError("--early-stopping needs --keep-best")
    if options.keep_best and not options.eval_every:
        raise MoeloraError("--keep-best needs --eval-every")
    if options.target_rank is not None and not options.target_modules:
        raise MoeloraError("--target-rank is for --target-modules, got none")
    if options.step_in_backward:
        for name, alone in (("grad_accumulation", 1), ("max_grad_norm", 0)):
            value = getattr(options, name)
            if value not in (None, alone):
                flag = "--" + name.replace("_", "-")
                raise MoeloraError(f"{flag} is {value:g}, expected {alone} with --step-in-backward")
    if options.field is not None and options.format not in (None, "text"):
        raise MoeloraError(f"--field names text, which rows of --format {options.format} are not")
