"""Whether a token's results may depend on what else is in the batch.

Tuned kernels pick tiles, and with them the order of their sums, by the number of rows. With batch invariance
on they do not look at it: forward and dX of a token are the same bits alone and in any batch, in any order.
That costs speed where few rows would have had kernels of their own.

There is one flag for the process, and an override for a thread, in which a backward takes its forward's flag
(autograd runs it in threads of its own, beside other work). The compiled operators keep a copy of both and
read it once a call; with MOELORA_BACKEND=triton, where they are not loaded, there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator

import torch

from . import backends
from .switches import SWITCHES

NO_OVERRIDE = -1


class _Thread(threading.local):
    override: bool | None = None


_THREAD = _Thread()
_PROCESS = {"on": False}


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library that `backends` loaded; the loader gives the same one again."""
    return None if SWITCHES.backend == "triton" else ctypes.CDLL(str(backends.LIBRARY))


def _tell(function: str, value: int) -> None:
    """Calls `function(int32)` of the operators' library, where it is loaded."""
    library = _library()
    if library is None:
        return
    try:
        call: Callable = getattr(library, function)
    except AttributeError:
        raise AttributeError(
            f"{backends.LIBRARY.name} must have the function {function}, got a build without it. "
            "Run `make setup`, or `pip install --no-build-isolation -e .`, in the source tree."
        ) from None
    call(ctypes.c_int32(value))


def set_batch_invariant(on: bool) -> None:
    """Sets whether forward and dX of a token are the same bits whatever else is in the batch: for the
    process, from the next call of an operator on. `MOELORA_BATCH_INVARIANT=1` sets it at import.

    A backward goes by what was set when its forward ran. Under `torch.compile` forward and backward go by
    what is set when they run: the flag is read by the kernels, and is no part of the graph. An `activation`
    that `moe_mlp` is given does as it likes.

    Raises:
        TypeError: `on` is no bool.
        AttributeError: the compiled operators are older than this package.
    """
    if not isinstance(on, bool):
        raise TypeError(f"set_batch_invariant: on must be a bool, got {on!r}")
    _tell("moelora_set_batch_invariant", int(on))
    _PROCESS["on"] = on


def is_batch_invariant() -> bool:
    """What an operator that this thread calls now goes by."""
    return _PROCESS["on"] if _THREAD.override is None else _THREAD.override


def flag_for_backward() -> bool | None:
    """What `as_in_forward` takes later; None while Dynamo traces, where there is nothing to keep."""
    return None if torch.compiler.is_dynamo_compiling() else is_batch_invariant()


@contextlib.contextmanager
def _overriding(on: bool) -> Iterator[None]:
    before = _THREAD.override
    _tell("moelora_override_batch_invariant", int(on))
    _THREAD.override = on
    try:
        yield
    finally:
        _THREAD.override = before
        _tell("moelora_override_batch_invariant", NO_OVERRIDE if before is None else int(before))


def as_in_forward(flag: bool | None) -> contextlib.AbstractContextManager:
    """Inside, the operators that this thread calls go by `flag`, from `flag_for_backward`."""
    if flag is None or flag == is_batch_invariant():
        return contextlib.nullcontext()
    return _overriding(flag)
