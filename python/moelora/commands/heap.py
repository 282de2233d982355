"""What malloc keeps of memory that was freed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import psutil
from torch import Tensor, nn

_LIBC = ctypes.CDLL(None)
_TRIM = getattr(_LIBC, "malloc_trim", None)  # glibc's


class _MallInfo2(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_INFO = getattr(_LIBC, "mallinfo2", None)
if _INFO is not None:
    _INFO.restype = _MallInfo2


LIMIT = 1 << 29  # bytes


def trim() -> None:
    """Gives it back to the system. Large blocks of one step are seldom put where those of another were, so
    that what is kept can be as large as the adapter.
    """
    if _TRIM is not None:
        _TRIM(0)


def beside() -> int:
    """Private bytes of this process that malloc has not given out: what was freed, and what is not its."""
    if _INFO is None:
        return 0
    memory, info = psutil.Process().memory_info(), _INFO()
    return memory.rss - memory.shared - info.uordblks - info.hblkhd


class Watch:
    """Trims when more than LIMIT was freed since the last time, asked for as each layer begins and ends.

    In a forward, what autograd keeps lies between blocks that are free again, half as large in all. In a
    backward, most of it is freed, and the page cache of a mapped base has better use for it.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        self._least = 0
        self.trim()
        self._hooks = [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in layers]

    def trim(self) -> None:
        trim()
        self._least = beside()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._look()
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(self._look)  # its gradient is the last of the layer's backward

    def _look(self, *_: Tensor) -> None:
        if beside() - self._least > LIMIT:
            self.trim()
