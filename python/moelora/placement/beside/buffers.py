"""Page-locked host memory that copies to and from an accelerator go through: reused and bounded."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from moelora.placement.beside.order import for_all_calls, wait

LIMIT = 256 << 20  # bytes that are kept for the next who asks
LEAST = 4096


class Buffers:
    """Buffers of one device. One that a copy may still read or write is not given to anybody else."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.allocated = 0  # bytes of all, in use and idle
        self._lock = threading.RLock()  # `give` may come from the garbage collector
        self._idle: dict[int, list[tuple[Tensor, torch.Event]]] = {}  # oldest first, by size

    def take(self, nbytes: int) -> Tensor:
        """At least so many bytes, [n] uint8, that nobody else reads or writes until `give`.

        Waits for the copy of the buffer that was given first, if more than `limit` bytes would be needed.
        """
        size = max(LEAST, 1 << (nbytes - 1).bit_length()) if nbytes else LEAST
        with self._lock:
            idle = self._idle.setdefault(size, [])
            for number, (buffer, event) in enumerate(idle):
                if event.query():
                    del idle[number]
                    return buffer
            found = idle.pop(0) if idle and self.allocated + size > self.limit else None
            if found is None:
                self._make_room(size)
                self.allocated += size
        if found is not None:
            wait(found[1])
            return found[0]
        return _page_locked(size)

    def give(self, buffer: Tensor, event: torch.Event) -> None:
        """Hands a buffer back, to be used again once `event`, recorded behind its copy, has happened."""
        with self._lock:
            self._idle[buffer.numel()].append((buffer, event))

    def _make_room(self, size: int) -> None:
        """Lets go of idle buffers of other sizes, as far as the limit asks for it."""
        for other, idle in self._idle.items():
            while other != size and idle and self.allocated + size > self.limit:
                _, event = idle.pop(0)
                wait(event)
                self.allocated -= other


@for_all_calls()
def _page_locked(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except (RuntimeError, NotImplementedError):  # a device without such memory: its copies wait
        return torch.empty(size, dtype=torch.uint8)


def typed(buffer: Tensor, like: Tensor) -> Tensor:
    """The beginning of a buffer as a contiguous tensor of `like`'s shape and dtype."""
    return buffer[: like.nbytes].view(like.dtype).view(like.shape)
