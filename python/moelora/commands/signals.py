"""Signals of a run: SIGTERM and SIGINT end it with a checkpoint, SIGUSR1 asks for one.

Only what the interpreter has loaded anyway is imported, so that the handlers are there before the libraries,
which take seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT)
SAVING = getattr(signal, "SIGUSR1", None)  # Windows has none
PIPE = getattr(signal, "SIGPIPE", 13)


class Stopped(KeyboardInterrupt):
    """A signal ended the run; `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(name(signum))
        self.signum = signum


class _State:
    def __init__(self, process: int = 0):
        self.process = process
        self.ending: int | None = None  # the signal that came
        self.save = False
        self.deferred = False  # in a training: its steps are finished first
        self.before: dict = {}


_state = _State()


def name(signum: int) -> str:
    """SIGTERM and the like."""
    return signal.Signals(signum).name


@contextmanager
def handled() -> Iterator[None]:
    """Within it signals are this module's affair. What the caller ignores, as nohup does, stays ignored."""
    global _state
    outer, _state = _state, _State(process=os.getpid())
    try:
        for signum in filter(None, (*ENDING, SAVING)):
            with suppress(ValueError):  # not the main thread, which gets them
                if signal.getsignal(signum) != signal.SIG_IGN:
                    _state.before[signum] = signal.signal(signum, _handle)
        yield
    finally:
        for signum, handler in _state.before.items():
            signal.signal(signum, handler)
        _state = outer


@contextmanager
def deferred() -> Iterator[None]:
    """Within it the first ending signal only sets `ending()`. Outside it raises Stopped, and so does the end
    of the block if one came.
    """
    check()
    _state.deferred = True
    try:
        yield
    finally:
        _state.deferred = False
    check()


def ending() -> int | None:
    """The signal that asked for the end, or None."""
    return _state.ending


def check() -> None:
    """Raises Stopped if the end was asked for."""
    if _state.ending is not None:
        raise Stopped(_state.ending)


def take_save() -> bool:
    """Whether a checkpoint was asked for since the last call."""
    wanted, _state.save = _state.save, False
    return wanted


def _handle(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.process:  # a worker that was forked off: as if nothing had been installed
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    if signum == SAVING:
        _state.save = _state.deferred
        _say("a checkpoint follows this step" if _state.deferred else "nothing to save now, going on", signum)
        return
    if _state.ending is not None:
        os._exit(128 + signum)
    _state.ending = signum
    for other in ENDING:  # by default they end the process at once, in the middle of a long call, too
        if other in _state.before:
            signal.signal(other, signal.SIG_DFL)
    if not _state.deferred:
        raise Stopped(signum)
    _say("finishing the step, then a checkpoint; once more ends at once", signum)


def _say(what: str, signum: int) -> None:
    text = f"\nmoelora: {name(signum)}: {what}\n"
    with suppress(OSError):
        try:
            print(text, end="", file=sys.stderr, flush=True)
        except RuntimeError:  # the signal came in the middle of another print
            os.write(sys.__stderr__.fileno(), text.encode())
