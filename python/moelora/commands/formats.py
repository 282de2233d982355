"""What rows of data are: text, conversations, prompts with completions. Recognised by fields, or refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from moelora.commands import files
from moelora.errors import MoeloraError

TEXT, CHAT, PAIRS, INSTRUCTION = "text", "chat", "prompt-completion", "instruction"
FORMATS = (TEXT, CHAT, PAIRS, INSTRUCTION)
# The fields that a format is recognised by.
_FIELDS = {
    CHAT: (("messages",), ("conversations",)),
    PAIRS: (("prompt", "completion"),),
    INSTRUCTION: (("instruction", "output"),),
}
SHOWN = 12  # fields in a message
_ROLES = {"human": "user", "gpt": "assistant"}
# Alpaca's, for a tokenizer without a chat template.
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the "
    "request.\n\n"
)
_ALPACA_INPUT = ", paired with an input that provides further context"


@dataclass
class Rows:
    """Rows of one format: columns `text`, or `messages` and perhaps `tools`, or `prompt` and `completion`."""

    format: str
    rows: Dataset
    source: str  # what they are, in words
    dropped: Counter = field(default_factory=Counter)  # reason → rows

    def told(self) -> str:
        """A line or two for the user."""
        lost = "; ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        return f"{self.source}, {len(self.rows):,} rows of format {self.format}" + (
            f"\nlost     {lost}" if lost else ""
        )


def read(paths: list[str], wanted: str | None, text_field: str | None, template: bool) -> Rows:
    """The rows in files and directories.

    Args:
        wanted: one of FORMATS, or None to recognise it.
        text_field: the field that holds text, instead of `text`.
        template: whether the tokenizer has a chat template, which instructions then become turns for.

    Raises: MoeloraError naming the file that cannot be read or is not recognised, or its row.
    """
    found, skipped = files.find(paths, anything_is_text=wanted == TEXT)
    parts: list[Dataset] = []
    formats: dict[str, Path] = {}
    dropped: Counter = Counter()
    if skipped:
        dropped["other files in the directories"] = skipped
    for path, reader in found:
        rows = files.read(path, reader, anything_is_text=wanted == TEXT)
        format = TEXT if reader == "text" else _recognise(path, rows.column_names, wanted, text_field)
        if reader == "text" and wanted not in (None, TEXT):
            raise MoeloraError(f"{path} is plain text, expected rows of format {wanted}")
        formats.setdefault(format, path)
        if len(formats) > 1:
            told = ", ".join(f"{path} is {format}" for format, path in formats.items())
            raise MoeloraError(f"expected files of one format, got several: {told}")
        column = "text" if reader == "text" else text_field or "text"
        parts += _taken(path, rows, _TAKE[format], column, template, dropped)
    if not parts:
        lost = "; ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise MoeloraError(f"nothing to train on in {' '.join(paths)}: {lost}")
    names = f"{found[0][0]}" if len(found) == 1 else f"{len(found)} files"
    return Rows(next(iter(formats)), _together(parts), names, dropped)


def _recognise(path: Path, columns: list[str], wanted: str | None, text_field: str | None) -> str:
    """The format of a file's rows."""
    fields = {TEXT: ((text_field or "text",),)} | _FIELDS
    listed = ", ".join(columns[:SHOWN]) + (
        f" and {len(columns) - SHOWN} more" if len(columns) > SHOWN else ""
    )
    have = [format for format, ways in fields.items() if any(set(way) <= set(columns) for way in ways)]
    if wanted is None and text_field is not None:
        wanted = TEXT
    if wanted is not None and wanted not in have:
        expected = " or ".join(" and ".join(f'"{name}"' for name in way) for way in fields[wanted])
        raise MoeloraError(f"{path}: expected rows with {expected}, got the fields {listed}")
    if wanted is None and len(have) > 1:
        raise MoeloraError(f"{path} has the fields of {' and of '.join(have)}: say which with --format")
    if wanted is None and not have:
        raise MoeloraError(
            f"{path} is of no known format, it has the fields {listed}: expected text, messages, "
            "prompt with completion, or instruction with output; --field names another field of text"
        )
    return wanted or have[0]


def _taken(
    path: Path, rows: Dataset, take: Callable, column: str, template: bool, dropped: Counter
) -> list[Dataset]:
    """`rows` with the columns of their format; what is null or empty is left out and counted."""
    if take is _text:
        rows = rows.select_columns([column])
    kept, numbers = [], []
    for number, row in enumerate(rows, 1):
        try:
            taken = take(row, column, template)
            if take is _text:
                numbers.append(number - 1)  # the texts stay on the disk
            else:
                kept.append(taken)
        except _Unusable as reason:
            dropped[f"rows with {reason}"] += 1
        except (MoeloraError, ValueError) as error:
            raise MoeloraError(f"{path} row {number}: {error}") from None
    if numbers:
        rows = rows.select(numbers)
        return [rows if column == "text" else rows.rename_column(column, "text")]
    return [Dataset.from_list(kept, on_mixed_types="use_json")] if kept else []


class _Unusable(Exception):
    """A row that has nothing to learn from."""


def _string(row: dict[str, Any], name: str, blank: bool = False) -> str:
    value = row.get(name)
    if value is None and not blank:
        raise _Unusable(f'nothing in "{name}" (null)')
    if value is not None and not isinstance(value, str):
        raise MoeloraError(f'expected text in "{name}", got {type(value).__name__}')
    if not blank and not value.strip():
        raise _Unusable(f'nothing in "{name}" (blank)')
    return value or ""


def _text(row: dict[str, Any], column: str, template: bool) -> dict[str, Any]:
    return {"text": _string(row, column)}


def _chat(row: dict[str, Any], column: str, template: bool) -> dict[str, Any]:
    row = {name: row[name] for name in ("messages", "conversations", "tools") if row.get(name) is not None}
    if "messages" in row:
        row.pop("conversations", None)
    name = next((name for name in ("messages", "conversations") if name in row), None)
    if name is None:
        raise _Unusable("no messages (null)")
    row[name] = _messages(row[name], name)
    row["messages"] = [_turn(message) for message in row.pop(name)]
    for message in row["messages"]:
        if not isinstance(message.get("role"), str):
            raise MoeloraError(f'expected a "role" in every message, got the fields {", ".join(message)}')
    if not any(
        m["role"] == "assistant" and (m.get("content") or m.get("tool_calls")) for m in row["messages"]
    ):
        raise _Unusable("no assistant's turn")
    return row


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    """A message; ShareGPT has other words for it."""
    if "from" not in message or "value" not in message:
        return message
    others = {name: item for name, item in message.items() if name not in ("from", "value")}
    return {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"], **others}


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    """A conversation, which CSV has as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise MoeloraError(f'"{name}" is not JSON: {error}') from None
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise MoeloraError(f'expected a list of messages in "{name}", got {type(value).__name__}')
    if not value:
        raise _Unusable("no messages (empty)")
    # What a reader adds to make all messages alike is none of theirs.
    return [{key: item for key, item in m.items() if item is not None or key == "content"} for m in value]


def _pair(row: dict[str, Any], column: str, template: bool) -> dict[str, Any]:
    if isinstance(row["completion"], list) or isinstance(row["prompt"], list):
        return {name: _messages(row[name], name) for name in ("prompt", "completion")}
    return {"prompt": _string(row, "prompt"), "completion": _string(row, "completion")}


def _instruction(row: dict[str, Any], column: str, template: bool) -> dict[str, Any]:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    context = _string(row, "input", blank=True).strip()
    if template:
        asked = f"{instruction}\n\n{context}" if context else instruction
        return {
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": output}],
        }
    prompt = _ALPACA.format(_ALPACA_INPUT if context else "") + f"### Instruction:\n{instruction}\n\n"
    prompt += f"### Input:\n{context}\n\n" if context else ""
    return {"prompt": prompt + "### Response:\n", "completion": output}


_TAKE = {TEXT: _text, CHAT: _chat, PAIRS: _pair, INSTRUCTION: _instruction}


def _together(parts: list[Dataset]) -> Dataset:
    if len(parts) == 1:
        return parts[0]
    if all(part.features == parts[0].features for part in parts):
        return concatenate_datasets(parts)
    return Dataset.from_list([row for part in parts for row in part], on_mixed_types="use_json")
