"""Peak memory beyond the weights: Linux's own counters of this process, or CUDA's allocator."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

from .layer import Batch, Layer, nbytes
from .peers.base import Runner

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

_keeps_freed = False


def keep_freed() -> None:
    """glibc's malloc: blocks that this process frees stay with it, as they do with the allocators that
    PyTorch's tuning guide recommends. Pages fresh from the system cost as much as some contestants' work,
    the more so the more others have just given back, and are not what is compared. Elsewhere nothing happens.
    """
    global _keeps_freed
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    _keeps_freed = bool(mallopt and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def keeps_freed() -> bool:
    """Whether `keep_freed` was called and had effect."""
    return _keeps_freed


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE).group(1)) * 1024


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
