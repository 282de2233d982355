"""The errors that a user can cause and mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class MoeloraError(Exception):
    """A problem with what the user asked for: one line that says what was expected and what came."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what libraries raise when a disk is full or a directory read-only into one line about `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    except RuntimeError as error:
        # torch.save reports a failed write as a RuntimeError from its zip writer.
        if "PytorchStreamWriter" not in str(error) and "file write failed" not in str(error):
            raise
        reason = "the disk is full or the file cannot be written"
    else:
        return
    raise MoeloraError(f"cannot write {path}: {reason}")
