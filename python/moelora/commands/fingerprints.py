"""What a run was made from, so that resuming can tell whether it is still the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from moelora.errors import MoeloraError

PIECE = 1 << 22
READERS = 4  # the hash waits for the disk
# Of a checkpoint's directory, what decides the model and its tokens.
_BASE = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "additional_chat_templates/*",
)


def file(path: Path, over: Callable[[], bool] = bool) -> str:
    """The digest of a file's content, or of what was read of it until `over`.

    Raises: MoeloraError if it cannot be read.
    """
    digest, room = xxhash.xxh3_128(), memoryview(bytearray(PIECE))
    try:
        with path.open("rb", buffering=0) as stream:
            while (size := stream.readinto(room)) and not over():
                digest.update(room[:size])
    except OSError as error:
        raise MoeloraError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()


def files(paths: Iterable[Path]) -> dict[str, str]:
    """path → digest."""
    paths = list(paths)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(map(str, paths), pool.map(file, paths), strict=True))


def names(directory: Path) -> list[str]:
    """The files of a checkpoint that decide what it is: weights, configuration and tokenizer."""
    found = {p for pattern in _BASE for p in directory.glob(pattern) if p.is_file()}
    return sorted(p.relative_to(directory).as_posix() for p in found)


def stamps(directory: Path) -> dict[str, list[int]]:
    """name → [bytes, ns of the last change] of these files, by which one that was not touched is known."""
    found = {name: (directory / name).stat() for name in names(directory)}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


def base(
    directory: Path, recorded: dict[str, str], earlier: dict[str, list[int]], now: dict[str, list[int]]
) -> dict[str, str]:
    """Digests of a checkpoint's files: the recorded ones where `earlier` and `now` are the same stamps."""
    same = {name: recorded[name] for name in recorded if now.get(name, 0) == earlier.get(name)}
    changed = [name for name in now if name not in same]
    digests = files(directory / name for name in changed)
    return same | dict(zip(changed, digests.values(), strict=True))


def texts(documents: Iterable[str]) -> str:
    """The digest of texts that come from no file."""
    digest = xxhash.xxh3_128()
    for text in documents:
        digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


def compare(recorded: dict[str, dict[str, str]], now: dict[str, dict[str, str]], where: str) -> None:
    """Complains about the first thing that is not what the run was started with.

    Args:
        recorded, now: what ("data", "base") → name → digest.
        where: the checkpoint, for the message.

    Raises: MoeloraError naming it.
    """
    for what, expected in recorded.items():
        found = now.get(what, {})
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) == found.get(name):
                continue
            if what == "data" and name not in found and Path(name).is_file():
                continue  # lies beside the data and is not read; earlier versions recorded all of a directory
            change = "changed" if name in expected and name in found else "is new"
            change = "is gone" if name not in found else change
            raise MoeloraError(
                f"{what} changed: {name} {change} since the run of {where} was started. Put back what it was "
                "to go on, or start anew with --overwrite"
            )
