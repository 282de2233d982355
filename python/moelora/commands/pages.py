"""Pages of mapped files."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor, nn

# Elsewhere the number may mean something else.
_MADVISE = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
_PAGEOUT = 21  # MADV_PAGEOUT: no page changes, and each is read again where it is needed


def looked_up(model: nn.Module) -> list[nn.Parameter]:
    """The weights of which a batch needs a few rows: embeddings that are no head, too."""
    modules = list(model.modules())
    heads = {id(module.weight) for module in modules if isinstance(module, nn.Linear)}
    tables = [module.weight for module in modules if isinstance(module, nn.Embedding)]
    return [table for table in tables if id(table) not in heads]


def give_back(tensor: Tensor) -> None:
    """Lets go of the pages of a contiguous tensor on the CPU that lies in a mapped file and was read through,
    and of which little will be needed again. Where the system does not know how, they stay.
    """
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if _MADVISE is not None and first < last:
        _MADVISE(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _PAGEOUT)
