"""Pages of mapped files."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

_MADVISE = getattr(ctypes.CDLL(None), "madvise", None)
_PAGEOUT = 21  # MADV_PAGEOUT of Linux: no page changes, and each is read again where it is needed


def give_back(tensor: Tensor) -> None:
    """Lets go of the pages of a contiguous tensor on the CPU that lies in a mapped file and was read through,
    and of which little will be needed again. Where the system does not know how, they stay.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if _MADVISE is not None and first < last:
        _MADVISE(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _PAGEOUT)
