"""The way between an accelerator and host memory, which waits for what it carries and for nothing else."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch import Tensor

from moelora.placement.beside.buffers import Buffers, typed
from moelora.placement.beside.order import after, mark, on, wait
from moelora.placement.beside.worker import Worker

_LINKS: dict[torch.device, Link] = {}
_LOCK = threading.Lock()


class Arrival:
    """Tensors on their way to the host."""

    def __init__(self, link: Link, sources: list[Tensor]) -> None:
        self._link, self._sources = link, sources  # kept until their copies are made
        self._buffers = [link.buffers.take(t.nbytes) for t in sources]
        after(link.outward, mark(link.device))
        with on(link.outward):
            for buffer, t in zip(self._buffers, sources, strict=True):
                typed(buffer, t).copy_(t, non_blocking=True)
            self._event = mark(link.device, link.outward)

    def __enter__(self) -> Arrival:
        return self

    def __exit__(self, *_: Any) -> None:
        for buffer in self._buffers:
            self._link.buffers.give(buffer, self._event)
        self._buffers, self._sources = [], []

    def __del__(self) -> None:  # of a backward that came to no end
        if hasattr(self, "_event"):
            self.__exit__()

    def wait(self) -> list[Tensor]:
        """The tensors, in page-locked memory that is theirs until `with` ends."""
        wait(self._event)
        return [typed(buffer, t) for buffer, t in zip(self._buffers, self._sources, strict=True)]


class Link:
    """Of one device. Rows go out on a stream of their own, and come in on that which computes with them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.buffers, self.worker = device, Buffers(), Worker(device)
        self.outward, self.inward = torch.Stream(device), torch.Stream(device)

    def fetch(self, *tensors: Tensor) -> Arrival:
        """Sends tensors to the host, behind what the current stream was given so far; use with `with`."""
        return Arrival(self, [t.detach().contiguous() for t in tensors])

    def send(self, tensor: Tensor) -> Tensor:
        """`tensor`, of the host, on the device: in the order of the current stream, and nobody waits."""
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        buffer = self.buffers.take(tensor.nbytes)
        try:
            staged = typed(buffer, tensor)
            staged.copy_(tensor.detach())
            out.copy_(staged, non_blocking=True)
        finally:
            self.buffers.give(buffer, mark(self.device))
        return out


def _in_child() -> None:
    """A fork has the links and none of the threads, one of which may have had the lock."""
    global _LOCK
    _LOCK = threading.Lock()
    for one in _LINKS.values():
        one.worker = Worker(one.device)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def link_of(device: torch.device) -> Link:
    """The one of a device."""
    with _LOCK:
        if device not in _LINKS:
            _LINKS[device] = Link(device)
        return _LINKS[device]
