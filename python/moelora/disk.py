"""What is written stays written, and what lies in a directory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from moelora.errors import MoeloraError


def sync(path: Path) -> None:
    """To the disk, so that a power cut does not leave a complete name over missing content."""
    with suppress(OSError):  # some file systems sync no directories
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def below(directory: Path) -> list[Path]:
    """The files below a directory, links to directories followed once each, what is hidden left out.

    Raises: MoeloraError naming a link to nothing, which stands for data that are not there, or a directory
        that cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise MoeloraError(f"cannot read {error.filename}: {error.strerror}")

    found, seen = [], set()
    for top, folders, names in os.walk(directory, onerror=unreadable, followlinks=True):
        real = os.path.realpath(top)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real in seen:
            continue
        seen.add(real)
        for path in (Path(top, name) for name in names if not name.startswith(".")):
            if not path.exists():
                raise MoeloraError(f"cannot read {path}: it is a link to nothing")
            if path.is_file():
                found.append(path)
    return sorted(found)
