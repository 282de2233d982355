"""What is written stays written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def sync(path: Path) -> None:
    """To the disk, so that a power cut does not leave a complete name over missing content."""
    with suppress(OSError):  # some file systems sync no directories
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
