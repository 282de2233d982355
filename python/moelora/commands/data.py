"""Rows of text, conversations and pairs in, rows of tokens out."""

from __future__ import annotations

import copy
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moelora.commands import formats
from moelora.errors import MoeloraError, one_line

PIECE = 1 << 20  # characters tokenized at once
UNKNOWN = 0.5  # the share of unknown tokens that no text which fits its tokenizer has
CHARACTERS = 30  # for each token, more than any tokenizer joins
IGNORED = -100  # the label of a token that is not learnt
WRAPPED = "wrapped"
PACKINGS = ("none", WRAPPED, "bfd", "bfd_split")


@dataclass
class Tokens:
    """Rows of tokens, with the columns `input_ids` and `labels`, and `seq_lengths` where texts are packed."""

    train: Dataset
    held_out: Dataset
    packing: str
    dropped: Counter = field(default_factory=Counter)  # reason → rows

    @property
    def bordered(self) -> bool:
        """Whether there are several texts in a row and none may see another."""
        return self.packing.startswith("bfd")

    def told(self) -> str:
        """A line for the user, and another if something was left out."""
        train, held_out = count(self.train), count(self.held_out)
        learnt = count(self.train, learnt=True)
        part = f", {learnt:,} of them in the loss," if learnt < train else ""
        lost = "; ".join(f"{number:,} {reason}" for reason, number in self.dropped.items())
        return (
            f"data     {train:,} tokens{part} in {len(self.train):,} rows to train on, "
            f"{held_out:,} in {len(self.held_out):,} held out" + (f"\nlost     {lost}" if lost else "")
        )


def count(rows: Dataset, learnt: bool = False) -> int:
    """How many tokens there are in rows, or how many are in the loss."""
    parts = flat(rows, "labels" if learnt else "input_ids")
    return sum(int((part != IGNORED).sum()) if learnt else len(part) for part in parts)


def flat(rows: Dataset, column: str = "input_ids") -> Iterator[np.ndarray]:
    """A column's numbers, [n] each, row after row."""
    values = rows.with_format("arrow")[column]
    for chunk in values if not hasattr(values, "chunks") else values.chunks:
        yield chunk.values.to_numpy(zero_copy_only=False)[
            chunk.offsets[0].as_py() : chunk.offsets[-1].as_py()
        ]


def check_ids(rows: Dataset, tokenizer: PreTrainedTokenizerBase, vocabulary: int, where: Path) -> None:
    """Looks at the token ids of rows, for what a tokenizer has wrong.

    Args:
        vocabulary: how many tokens the model has embeddings for.
        where: the tokenizer's directory, for the message.

    Raises: MoeloraError if an id is beyond the vocabulary, or if most tokens are unknown ones.
    """
    total = unknown = 0
    for ids in flat(rows):
        total += len(ids)
        unknown += int((ids == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
        if len(ids) and ids.max() >= vocabulary:
            raise MoeloraError(
                f"the tokenizer in {where} gives the id {ids.max()}, the model has embeddings for "
                f"{vocabulary} tokens: they do not belong together"
            )
    if unknown > UNKNOWN * total:
        raise MoeloraError(
            f"the tokenizer in {where} does not know {unknown:,} of {total:,} tokens of the data: it does "
            "not fit them, or is damaged"
        )


def language_reference() -> list[str]:
    """Python's language reference as it ships with Python: one document a topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MoeloraError("this Python comes without pydoc_data: name text files with --data") from None
    return [topics[name] for name in sorted(topics)]


# ---- texts end to end, cut into rows of one length


def split(documents: list[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) documents: whole documents where there are at least ten, else the end of each."""
    if len(documents) >= 10:
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        sizes = accumulate(len(documents[index]) for index in order)
        wanted = held_out * sum(map(len, documents))
        count = 1 + sum(size < wanted for size in sizes)
        aside = set(order[: min(count, len(documents) - 1)])
        return (
            [text for index, text in enumerate(documents) if index not in aside],
            [text for index, text in enumerate(documents) if index in aside],
        )
    cuts = [round(len(text) * (1 - held_out)) for text in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return [text[:cut] for text, cut in pairs], [text[cut:] for text, cut in pairs]


def blocks(
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    length: int,
    what: str,
    dropped: Counter | None = None,
) -> Dataset:
    """The documents' tokens, each document closed by the end-of-text token, cut into rows of `length`.

    What fills no row is counted in `dropped`.

    Raises: MoeloraError if they do not fill one row; `what` names them.
    """
    end = [] if tokenizer.eos_token_id is None else [torch.tensor([tokenizer.eos_token_id])]
    parts = [part for text in documents for part in (*_pieces(tokenizer, text), *end)]
    tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    characters = sum(map(len, documents))
    if characters > CHARACTERS * max(1, tokens.numel()):
        raise MoeloraError(
            f"the tokenizer makes {tokens.numel():,} tokens of the {what}'s {characters:,} characters: it "
            "does not fit them, or is damaged"
        )
    if tokens.numel() < length:
        raise MoeloraError(
            f"the {what} is {tokens.numel()} tokens long, expected at least --seq-length ({length})"
        )
    if dropped is not None and tokens.numel() % length:
        dropped["tokens at the ends, which fill no row"] += tokens.numel() % length
    rows = tokens[: tokens.numel() // length * length].view(-1, length).numpy()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[Tensor]:
    """A text's tokens in pieces, because tokenizers need hundreds of bytes for each token."""
    for start in range(0, len(text), PIECE):
        piece = tokenizer(text[start : start + PIECE], add_special_tokens=False, verbose=False)
        yield torch.tensor(piece["input_ids"], dtype=torch.int64)


# ---- rows through SFTTrainer


def tokens(
    source: formats.Rows,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    packing: str | None,
    loss: str | None,
    held_out: float | formats.Rows,
    seed: int,
) -> Tokens:
    """Tokens of rows of any format.

    Args:
        length: tokens in a row, at most.
        packing: one of PACKINGS; None: texts wrapped, other rows one by one.
        loss: "all" or "answers"; None: the answers where there are some.
        held_out: the share of rows to hold out, or rows.

    Raises: MoeloraError if the tokenizer cannot, or if too little is left.
    """
    dropped: Counter = Counter()
    packing = packing or (WRAPPED if source.format == formats.TEXT else "none")
    if source.format == formats.TEXT and packing == WRAPPED:
        texts = source.rows["text"]
        aside = list(held_out.rows["text"]) if isinstance(held_out, formats.Rows) else None
        parts = split(list(texts), held_out, seed) if aside is None else (list(texts), aside)
        named = zip(parts, ("training text", "held-out text"), strict=True)
        rows = [blocks(tokenizer, texts, length, what, dropped) for texts, what in named]
        return Tokens(*rows, packing, dropped)
    if isinstance(held_out, formats.Rows):
        parts = [
            _learnable(_tokenized(rows, tokenizer, loss), length, packing, dropped)
            for rows in (source, held_out)
        ]
    else:
        rows = _learnable(_tokenized(source, tokenizer, loss), length, packing, dropped)
        if len(rows) < 2:
            raise MoeloraError(
                f"{len(rows)} rows are left to train on, expected at least 2, one of them held out"
            )
        aside = min(len(rows) - 1, max(1, round(held_out * len(rows))))
        halves = rows.train_test_split(test_size=aside, seed=seed)
        parts = [halves["train"], halves["test"]]
    if not all(map(len, parts)):
        raise MoeloraError("no rows are left to train on or to hold out")
    packed = packing != "none"
    arguments = {"packing": packed} | ({"packing_strategy": packing} if packed else {})
    train, aside = _through_trl(tokenizer, *parts, max_length=length, **arguments)
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in train.column_names]
    return Tokens(train.select_columns(columns), aside.select_columns(columns), packing, dropped)


def _tokenized(source: formats.Rows, tokenizer: PreTrainedTokenizerBase, loss: str | None) -> Dataset:
    """Whole rows of tokens, with labels."""
    first = source.rows[0]
    turns = "messages" in first or isinstance(first.get("prompt"), list)
    if turns and not tokenizer.chat_template:
        raise MoeloraError(
            f"{source.source} has conversations, and the tokenizer has no chat template for them: expected "
            "one in the model's directory or with --chat-template"
        )
    if not turns and tokenizer.eos_token is None:
        raise MoeloraError(
            "the tokenizer has no end-of-text token, which closes every text: try --packing wrapped"
        )
    if loss == "answers" and source.format == formats.TEXT:
        raise MoeloraError("--loss answers needs conversations or prompts with completions, got plain text")
    answers = loss != "all"
    try:
        rows, _ = _through_trl(
            tokenizer,
            source.rows,
            max_length=None,
            completion_only_loss=answers and "prompt" in first,
            assistant_only_loss=answers and "messages" in first,
        )
    except (ValueError, RuntimeError, TypeError, KeyError, TemplateError) as error:
        raise _told(source, tokenizer, error, answers) from None
    return rows


def _told(
    source: formats.Rows, tokenizer: PreTrainedTokenizerBase, error: Exception, answers: bool
) -> MoeloraError:
    """What the tokenizer's template makes of the rows, or where it stops."""
    for number, row in enumerate(source.rows, 1):
        messages = row.get("messages") or [*row.get("prompt", []), *row.get("completion", [])]
        try:
            if isinstance(messages[0], dict):
                tokenizer.apply_chat_template(messages, tools=row.get("tools"))
        except Exception as why:  # a template raises what it likes
            return MoeloraError(
                f"the chat template does not take row {number} of {source.source}: {one_line(why)}"
            )
    if answers and "messages" in source.rows.column_names:
        return MoeloraError(
            "the chat template does not tell which tokens are the assistant's ({% generation %}): --loss all "
            f"trains on every turn, --chat-template names another ({one_line(error)})"
        )
    return MoeloraError(f"cannot turn the rows of {source.source} into tokens: {one_line(error)}")


def _learnable(rows: Dataset, length: int, packing: str, dropped: Counter) -> Dataset:
    """Rows with something to learn in what is kept of them; what is left out or cut is counted."""
    cut = packing in ("none", "bfd")
    long = sum(len(ids) > length for ids in rows["input_ids"]) if cut else 0
    end = length if cut else None
    kept = [i for i, labels in enumerate(rows["labels"]) if any(label != IGNORED for label in labels[1:end])]
    if len(kept) < len(rows):
        dropped["rows with nothing to learn within --seq-length"] += len(rows) - len(kept)
    if long:
        dropped[f"rows cut to --seq-length ({length})"] += long
    return rows.select(kept)


def _through_trl(
    tokenizer: PreTrainedTokenizerBase, train: Dataset, held_out: Dataset | None = None, **arguments: Any
) -> tuple[Dataset, Dataset | None]:
    """What SFTTrainer makes of rows. It does so where it is made, hence with a model that costs nothing."""
    sizes = {"vocab_size": 1, "hidden_size": 2, "intermediate_size": 1, "num_hidden_layers": 0}
    config = LlamaConfig(**sizes, num_attention_heads=1, bos_token_id=None, eos_token_id=None)
    with tempfile.TemporaryDirectory() as out, torch.random.fork_rng():
        trainer = SFTTrainer(
            LlamaForCausalLM(config),
            SFTConfig(output_dir=out, use_cpu=True, bf16=False, report_to="none", **arguments),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=padded(tokenizer),
        )
    return trainer.train_dataset, trainer.eval_dataset


def padded(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that has some token for padding, which no loss and no attention sees."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


# ---- some of the rows


def spread(rows: Dataset, count: int) -> Dataset:
    """At most `count` of the rows, evenly spaced."""
    return rows.select(torch.linspace(0, len(rows) - 1, min(count, len(rows))).long().tolist())


def batch(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, bordered: bool, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """A model's inputs and labels, as the trainer collates them."""
    collate = DataCollatorForLanguageModeling(padded(tokenizer).pad_token_id, padding_free=bordered)
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in collate([rows[i] for i in range(len(rows))]).items()
    }


def prompt(row: dict[str, Any], length: int) -> list[int]:
    """The start of a row: what comes before the first answer, or `length` tokens where all is learnt."""
    ids, labels = row["input_ids"], row["labels"]
    first = next((i for i, label in enumerate(labels) if label != IGNORED), 0)
    return ids[:first] if first > 1 else ids[: min(length, len(ids) // 2)]


def load_template(path: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the tokenizer the chat template in a file.

    Raises: MoeloraError if it cannot be read.
    """
    if path is None:
        return
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MoeloraError(f"cannot read --chat-template {path}: {one_line(error)}") from None
