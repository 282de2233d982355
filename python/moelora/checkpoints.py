"""Local checkpoints: what they are, whether they have experts, and loading them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from moelora import attention, configurations, norms, stored
from moelora.errors import MoeloraError, one_line
from moelora.experts import is_experts, outside
from moelora.loading import from_pretrained

SHOWN = 6  # kinds of keys that a message lists
# Any of them is a vocabulary; which ones a tokenizer reads, transformers does not tell reliably.
_VOCABULARIES = (
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "*.vocab",
)


def inspect(directory: Path) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """The configuration and tokenizer of a checkpoint whose model has experts. No weights are loaded.

    Raises: MoeloraError naming the directory and what it lacks.
    """
    _check_directory(directory)
    stored.required(directory)
    _, config = outline(directory)
    return config, _tokenizer(directory, config)


def _tokenizer(directory: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    with _loading(directory, "the tokenizer"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                directory, config=config, local_files_only=True, trust_remote_code=False
            )
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise MoeloraError(
                f"the tokenizer in {directory} is code of its own, which is never run: with a tokenizer.json "
                'beside it, take "auto_map" out of tokenizer_config.json'
            ) from None
        # transformers makes up an empty one where the files are missing.
        of_its_own = not tokenizer.vocab_files_names and (directory / "tokenizer_config.json").is_file()
        if not of_its_own and not any(any(directory.glob(name)) for name in _VOCABULARIES):
            raise MoeloraError(f"{directory} has no tokenizer: expected a tokenizer.json or the like in it")
        known = len(tokenizer) - len(tokenizer.added_tokens_decoder)
    if known <= 0:
        raise MoeloraError(f"the tokenizer in {directory} has no tokens but the special ones")
    return tokenizer


def outline(directory: Path) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """The model with experts that a checkpoint's configuration describes, on the meta device, and the latter.

    Raises: MoeloraError naming the directory and what it lacks.
    """
    _check_directory(directory)
    with _loading(directory, "the configuration"):
        config = configurations.read(directory, local_files_only=True).config
    with _loading(directory, "a language model"), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    if not any(is_experts(module) for module in empty.modules()):
        raise MoeloraError(
            f"{directory} holds a {type(empty).__name__}, which has no expert layers: expected a "
            f"mixture-of-experts model that follows transformers' experts interface{outside(empty)}"
        )
    attention.use(empty)
    norms.use(empty)
    return empty, config


def load(
    directory: Path, dtype: str, fresh: Sequence[str] = (), seed: int = 0
) -> tuple[PreTrainedModel, list[str]]:
    """The causal language model in `directory`, and the keys whose weights are not from there. Attention is
    `moelora.attention`'s where that has another than transformers; norms are `moelora.norms`'s.

    Args:
        dtype: a name or "auto".
        fresh: patterns (`lm_head.*`) of keys that may be missing or of another shape, which are then drawn at
            random, or that the model does not have, which are left out.
        seed: of what is drawn.

    Raises: MoeloraError if it cannot be loaded, or if keys are missing, unexpected or of another shape.
    """
    stored.required(directory)
    report = _Report()
    set_seed(seed)
    with _loading(directory, "a language model", report), report.listening():
        model, info = from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,  # pickles never run
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
        )
    shapes = {name: f"{name} is {_size(a)}, expected {_size(b)}" for name, a, b in info["mismatched_keys"]}
    problems = {
        "missing": _left(info["missing_keys"], fresh),
        "unexpected": _left(info["unexpected_keys"], fresh),
        "of another shape": [shapes[name] for name in _left(shapes, fresh)],
    }
    if told := "; ".join(f"{what}: {listed(keys)}" for what, keys in problems.items() if keys):
        raise MoeloraError(f"the weights in {directory} do not fit its configuration. {told}")
    attention.use(model)
    norms.use(model)
    return model, sorted(info["missing_keys"] | set(shapes))


def _left(keys: Iterable[str], fresh: Sequence[str]) -> list[str]:
    return sorted(key for key in keys if not any(fnmatchcase(key, pattern) for pattern in fresh))


def _size(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def listed(keys: Iterable[str]) -> str:
    """Keys in a line: those that differ in numbers only are counted together."""
    kinds: dict[str, list[str]] = {}
    for key in keys:
        kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".*", key), []).append(key)
    shown = [same[0] if len(same) == 1 else f"{kind} ({len(same)})" for kind, same in kinds.items()]
    more = f" and {len(shown) - SHOWN} more kinds" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def check_runs(model: nn.Module, directory: Path) -> None:
    """A forward pass of two tokens, which meets what a configuration can have wrong.

    Raises: MoeloraError with what the model raised.
    """
    device = model.get_input_embeddings().weight.device
    with _loading(directory, "what the model computes"), torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device))


class _Report(logging.Handler):
    """What transformers logs of a load: its exceptions refer to this."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += " ".join(re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage()).split()) + " "

    @contextmanager
    def listening(self) -> Iterator[None]:
        logger = logging.getLogger("transformers.modeling_utils")
        level, propagate = logger.level, logger.propagate
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate


@contextmanager
def _loading(directory: Path, what: str, report: _Report | None = None) -> Iterator[None]:
    """Whatever transformers raises about a checkpoint, in one line."""
    try:
        yield
    except MoeloraError:
        raise
    except Exception as error:
        told = one_line(error)
        if report is not None and "above report" in told:
            entries = report.text.partition("LOAD REPORT")[2].partition("from:")[2].partition("Notes:")[0]
            told = entries.partition("-+-")[2].lstrip("-+ ") or told
        raise MoeloraError(f"cannot load {what} from {directory}: {told}") from None


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise MoeloraError(f"{directory} is not a directory, expected a local transformers checkpoint")
    if not (directory / "config.json").exists():
        raise MoeloraError(f"{directory} is not a transformers checkpoint: expected a config.json in it")


def computing(directory: Path):
    """A context in which what a model raises, whose configuration is wrong, is told in one line."""
    return _loading(directory, "what the model computes")


def count(model: nn.Module, trainable: bool = False) -> int:
    """How many parameters a model has, or how many of them are trainable."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)
