"""Commands side by side, a few at a time; each writes a log, and none outlives its caller."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
_GRACE = 2.0  # seconds between asking processes to end and ending them


class Processes:
    """Commands under way. Each leads a session of its own: what it started is found and ended with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self.ended = False

    def run(self, command: list[str], log: Path, **options) -> int:
        """The exit status of `command`, whose output is in `log`; negative where a signal ended it."""
        with log.open("wb") as output:
            with self._lock:
                if self.ended:
                    return -signal.SIGTERM
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True, **options,
                )  # fmt: skip
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.remove(process)
                _signal(process, signal.SIGKILL)  # what it left behind

    def end(self) -> None:
        """Ends all of them, and starts no more."""
        with self._lock:
            self.ended = True
            running = list(self._running)
        for process in running:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
            _signal(process, signal.SIGKILL)


def _signal(leader: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader.pid, number)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Whatever ends the block, a signal or an exception too, ends the processes."""
    before = signal.signal(signal.SIGTERM, _terminated)
    found = Processes()
    try:
        yield found
    finally:
        found.end()
        signal.signal(signal.SIGTERM, before)


def in_order(calls: list[Callable[[], _T]], workers: int) -> list[_T]:
    """Their results. Started in the order given, `workers` at a time."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(call) for call in calls]
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
