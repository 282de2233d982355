"""The weight files of a checkpoint: which they are, and what their headers say. No weights are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moelora.errors import MoeloraError, one_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def files(directory: Path) -> list[Path]:
    """The checkpoint's weight files in safetensors, as transformers finds them; none if there are none.

    Raises: MoeloraError if an index lacks its map or a file, or files that belong together lack their index.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        return _indexed(directory)
    if shards := sorted(path.name for path in directory.glob("*.safetensors") if _SHARD.fullmatch(path.name)):
        raise MoeloraError(f"{directory} has {shards[0]} and no {INDEX}, which tells what is in which file")
    return []


def _indexed(directory: Path) -> list[Path]:
    index = directory / INDEX
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weights.values()))
    except (OSError, ValueError) as error:
        raise MoeloraError(f"cannot read {index}: {one_line(error)}") from None
    except (KeyError, TypeError, AttributeError):
        raise MoeloraError(f'{index} has no "weight_map" from tensors to files') from None
    if not names:
        raise MoeloraError(f'the "weight_map" of {index} names no file')
    for name in names:
        if not (directory / str(name)).is_file():
            raise MoeloraError(f"{index} names {name}, which is not in {directory}")
    there = {name: set(header(directory / name)) for name in names}
    for tensor, name in weights.items():
        if tensor not in there[name]:
            raise MoeloraError(f"{index} says that {tensor} is in {name}, which does not have it")
    return [directory / name for name in names]


def required(directory: Path) -> list[Path]:
    """As `files`, and an error if there are none, which says what else is there."""
    found = files(directory)
    if not found:
        others = sorted(
            p.name for p in directory.iterdir() if p.suffix in (".bin", ".safetensors", ".pt", ".gguf")
        )
        beside = f" (there is {', '.join(others[:3])}, which is not read)" if others else ""
        raise MoeloraError(
            f"{directory} is not a transformers checkpoint: expected weights ({SINGLE}, or {INDEX} and what "
            f"it names) in it{beside}"
        )
    return found


def header(path: Path) -> dict[str, str]:
    """Tensor → dtype, as a safetensors file's header names it.

    Raises: MoeloraError if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _dtype(file, name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise MoeloraError(f"cannot read the header of {path}: {one_line(error)}") from None


def _dtype(file: Any, name: str) -> str:
    return file.get_slice(name).get_dtype()
