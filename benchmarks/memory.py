"""Peak memory beyond the weights: Linux's own counters of this process, or CUDA's allocator."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from moelora import cgroups

from .layer import Batch, Layer, nbytes
from .peers.base import Runner
from .registry import Shape

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

_keeps_freed = False
_spare = 0


def keep_freed(spare: int = 0) -> None:
    """glibc's malloc: blocks that this process frees stay with it, as they do with the allocators that
    PyTorch's tuning guide recommends, and so do `spare` bytes from the start (at most a third of the free
    memory). Pages fresh from the system cost as much as some contestants' work, the more so the more others
    have just given back, and are not what is compared. Elsewhere nothing happens.

    Without the spare bytes a block may be fresh long after its like was freed: glibc before 2.38 asks for a
    little more than the size of an aligned block, so that the hole which one leaves does not fit the next.
    """
    global _keeps_freed, _spare
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    _keeps_freed = bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
    if _keeps_freed and spare:
        _spare = min(spare, _available() // 3)
        torch.ones(_spare, dtype=torch.uint8)


def spare_for(shapes: Iterable[Shape], dtype: torch.dtype) -> int:
    """Weights, and three times as much again: some contestants' intermediate results are as large."""
    return 4 * max(shape.experts * shape.weights_per_expert * dtype.itemsize for shape in shapes)


def keeps_freed() -> bool:
    """Whether `keep_freed` was called and had effect."""
    return _keeps_freed


def spare() -> int:
    """Bytes that `keep_freed` took at the start."""
    return _spare


def _field(path: str, field: str) -> int:
    text = Path(path).read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE).group(1)) * 1024


def _status(field: str) -> int:
    return _field("/proc/self/status", field)


def _available() -> int:
    """Bytes that can be had without swapping, of the machine or of this process's control groups."""
    machine = _field("/proc/meminfo", "MemAvailable")
    return min([machine, *(max(0, group.limit - group.used) for group in cgroups.groups())])


@dataclass
class Away:
    """Memory that nobody else gets while this exists, and what keeps it."""

    room: mmap.mmap
    by: str


def keep_away(size: int) -> Away:
    """Takes `size` bytes and locks them; where this process may not, touches them, which keeps them from
    others as long as nothing is swapped out.

    Raises: OSError if they are not to be had, or might be swapped out.
    """
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    if libc.mlock(ctypes.addressof(ctypes.c_char.from_buffer(room)), size) == 0:
        return Away(room, "locked")
    if _field("/proc/meminfo", "SwapTotal"):
        why = os.strerror(ctypes.get_errno())
        raise OSError(f"cannot lock {size} bytes ({why}), and what is not locked may be swapped out")
    if size > _available():
        raise OSError(f"{size} bytes are not to be had, {_available()} are")
    for at in range(0, size, mmap.PAGESIZE):
        room[at] = 1
    return Away(room, "touched, without swap")


def resident() -> int:
    return _status("VmRSS")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    return _status("VmHWM")


def allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def cuda_peak(layer: Layer, batch: Batch, runner: Runner, held: int) -> int:
    """A step at its peak, what the contestant holds between steps, the batch and the adapters."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    runner.time(batch)
    step = torch.cuda.max_memory_allocated() - before
    own = {p.data_ptr() for p in getattr(runner, "parameters", ())}
    shared = [p for p in layer.lora.values() if p.data_ptr() in own]
    return step + held + nbytes(batch.x, batch.expert_idxs, batch.gates, batch.dy, *shared)
