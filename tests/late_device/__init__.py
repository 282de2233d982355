"""A device that is late on purpose, so that what waits for it is tested without an accelerator.

`start()` makes "late" a device of this process: host memory, the CPU's kernels, and streams whose work is
done when somebody waits for it and not before. A copy that was not waited for has not happened, and memory
that is taken again too early is seen to have changed, in every run alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import types
from collections.abc import Iterator
from typing import NamedTuple

import torch

from late_device import build

NAME = "late"


class Counts(NamedTuple):
    """What the device has done since it was started; memory is in bytes."""

    device_synchronisations: int
    stream_synchronisations: int
    event_synchronisations: int
    bytes: int
    peak: int
    pinned: int
    device_to_host: int
    host_to_device: int


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build.library()))


@functools.cache
def start() -> torch.device:
    """The device; once for a process, before its first backward: autograd then has a thread for it."""
    torch.ops.load_library(str(build.library()))
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.zeros(1, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device(NAME, 0)


def counts() -> Counts:
    found = (ctypes.c_int64 * len(Counts._fields))()
    _library().late_counts(found)
    return Counts(*found)


def reset_peak() -> None:
    _library().late_reset_peak()


@contextlib.contextmanager
def eager(streams: int) -> Iterator[None]:
    """0: all streams are late, as they are. 1: all but the default one run ahead. 2: none is late."""
    _library().late_set_eager(streams)
    try:
        yield
    finally:
        torch.accelerator.synchronize()
        _library().late_set_eager(0)
