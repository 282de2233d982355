"""The host's share in a thread of its own, while the caller's launches the accelerator's: for launching takes
the host's time too, and a device that is done before the host begins is not beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context
from functools import partial
from typing import TypeVar

import torch

from moelora.placement.beside.order import on
from torch_moelora.batch_invariance import as_in_forward, is_batch_invariant

A, B = TypeVar("A"), TypeVar("B")


class Worker:
    """One thread beside the callers of a device; it lives until the interpreter ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._idle = threading.Lock()  # held while something runs there
        self._thread: ThreadPoolExecutor | None = None  # once it is needed

    def both(
        self, there: Callable[[], A], here: Callable[[], B], threads: int, apart: bool = True
    ) -> tuple[A, B]:
        """What `there` returns, which launches in the caller's thread, and `here`, which computes meanwhile.

        They run one after the other, `there` first, if not `apart`, where something of the caller's is
        `_bound` to its thread, and where the worker is busy: with another thread's call, or with the very one
        that this is part of. So nobody waits for a turn. threads: how many `here` computes with.
        Raises: what either raises, `there`'s if both do; by then both have ended.
        """
        future = self._begin(here, threads) if apart and not _bound() else None
        if future is None:
            return there(), here()
        try:
            return there(), future.result()
        finally:
            wait([future])
            future = None  # an error has this frame, and the future has the error

    def _begin(self, here: Callable[[], B], threads: int) -> Future[B] | None:
        """None if the worker is not to be had."""
        guards = _guards(self.device)
        if not self._idle.acquire(blocking=False):
            return None

        def run() -> B:
            try:
                with ExitStack() as stack:
                    if torch.get_num_threads() != threads:  # OpenMP has a number for each thread
                        torch.set_num_threads(threads)
                    for guard in guards:
                        stack.enter_context(guard())
                    return here()
            finally:
                self._idle.release()

        try:
            if self._thread is None:
                thread = ThreadPoolExecutor(1, "moelora-host", _enter, (self.device,))
                thread.submit(int).result()
                self._thread = thread
            return self._thread.submit(copy_context().run, run)
        except RuntimeError:  # the interpreter is ending, or there are no more threads
            self._idle.release()
            return None


def _enter(device: torch.device) -> None:
    """What the thread begins with: a device, so that it opens no other one, and autocast, for its cache is
    everybody's, and whoever leaves autocast altogether clears it.
    """
    torch.accelerator.set_device_index(device)
    torch.autocast_increment_nesting()


def _bound() -> bool:
    """Whether the caller's thread has what no other can be given: modes that see every operator. Hooks for
    what autograd saves are not among them: `shares.Kept` gets along.
    """
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def _guards(device: torch.device) -> list[Callable[[], AbstractContextManager]]:
    """What makes another thread compute as this one would."""
    guards: list[Callable[[], AbstractContextManager]] = [
        partial(on, torch.accelerator.current_stream(device)),
        partial(torch.inference_mode, torch.is_inference_mode_enabled()),
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
        partial(as_in_forward, is_batch_invariant()),
    ]
    cached = torch.is_autocast_cache_enabled()
    for kind in ("cpu", device.type):
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            guards.append(partial(torch.autocast, kind, dtype, cache_enabled=cached))
    return guards
