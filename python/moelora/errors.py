"""The errors that a user can cause and mend."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_warned: set[str] = set()


class MoeloraError(Exception):
    """A problem with what the user asked for: one line that says what was expected and what came."""


def one_line(error: BaseException) -> str:
    """All that an error says, in one line; its kind too, where the words alone say little."""
    words = " ".join(str(error).split())
    if (
        isinstance(error, (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError))
        or not words
    ):
        return f"{type(error).__name__}: {words}" if words else type(error).__name__
    return words


def memory(error: BaseException) -> str | None:
    """What to say if `error` is about memory, the processor's or a device's, else None."""
    words = one_line(error)
    if not isinstance(error, MemoryError) and not re.search(r"out of memory|t allocate memory", words):
        return None
    return f"not enough memory: {words}. Less is needed with a smaller --batch-size, --seq-length or --rank"


def warn_once(message: str) -> None:
    """A warning that each process gives once, however many layers and steps it concerns."""
    if message not in _warned:
        _warned.add(message)
        logging.getLogger("moelora").warning(message)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what libraries raise when a disk is full or a directory read-only into one line about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
    except SafetensorError as error:
        reason = re.sub(r".*I/O error: | \(os error \d+\)", "", str(error))
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        reason = "torch.save failed, is the disk full?"  # its zip writer does not tell more
    else:
        return
    raise MoeloraError(f"cannot write {path}: {reason}")
