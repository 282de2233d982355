"""Text in, blocks of tokens out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moelora.errors import MoeloraError

PIECE = 1 << 20  # characters tokenized at once


def read_files(paths: list[str], field: str) -> list[str]:
    """The documents in `paths`: each text file is one, each line of a .jsonl file is one.

    Raises: MoeloraError naming the file (and line) that is missing, empty, not UTF-8 or not as expected.
    """
    return [document for path in paths for document in _read_file(Path(path), field)]


def _read_file(path: Path, field: str) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MoeloraError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MoeloraError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise MoeloraError(f"{path} is empty, expected text")
    if path.suffix.lower() != ".jsonl":
        return [text]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_json_text(line, field, f"{path} line {number}") for number, line in lines]


def _json_text(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise MoeloraError(f"{where} is not JSON: {error.msg}") from None
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        found = f"the fields {', '.join(sorted(row))}" if isinstance(row, dict) else type(row).__name__
        raise MoeloraError(f'{where}: expected an object with text in "{field}", got {found}')
    return row[field]


def language_reference() -> list[str]:
    """Python's language reference as it ships with Python: one document a topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MoeloraError("this Python comes without pydoc_data: name text files with --data") from None
    return [topics[name] for name in sorted(topics)]


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


def blocks(tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int, what: str) -> Tensor:
    """The documents' tokens, each document closed by the end-of-text token, cut into rows: [n, length] int64.

    Raises: MoeloraError if they do not fill one row; `what` names them.
    """
    end = [] if tokenizer.eos_token_id is None else [torch.tensor([tokenizer.eos_token_id])]
    parts = [part for text in documents for part in (*_tokens(tokenizer, text), *end)]
    tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    if tokens.numel() < length:
        raise MoeloraError(
            f"the {what} is {tokens.numel()} tokens long, expected at least --seq-length ({length})"
        )
    return tokens[: tokens.numel() // length * length].view(-1, length)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[Tensor]:
    """A text's tokens in pieces, because tokenizers need hundreds of bytes for each token."""
    for start in range(0, len(text), PIECE):
        piece = tokenizer(text[start : start + PIECE], add_special_tokens=False, verbose=False)
        yield torch.tensor(piece["input_ids"], dtype=torch.int64)


def spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows [n, length], evenly spaced."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def dataset(rows: Tensor) -> Dataset:
    """Rows of tokens [n, length] as a dataset with the column `input_ids`."""
    return Dataset.from_dict({"input_ids": rows.numpy()})
