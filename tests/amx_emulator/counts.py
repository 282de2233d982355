"""The emulator's counters, read in the process that it is preloaded into."""

from __future__ import annotations

import ctypes

_PROCESS = ctypes.CDLL(None)


class Counts(ctypes.Structure):
    """Instructions of all threads since the last reset. `live`: threads that now hold a configuration."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("configs", "releases", "zeros", "loads", "stores", "products", "live")
    ]


def available() -> bool:
    return hasattr(_PROCESS, "moelora_amx_counts")


def read() -> Counts:
    counts = Counts()
    _PROCESS.moelora_amx_counts(ctypes.byref(counts))
    return counts


def reset() -> None:
    _PROCESS.moelora_amx_reset()
