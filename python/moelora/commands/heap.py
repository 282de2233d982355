"""What malloc keeps of memory that was freed."""

from __future__ import annotations

import ctypes

_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's


def trim() -> None:
    """Gives it back to the system. Large blocks of one step are seldom put where those of another were, so
    that what is kept can be as large as the adapter.
    """
    if _TRIM is not None:
        _TRIM(0)
