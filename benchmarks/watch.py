"""The memory of another process, looked at from outside while it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import psutil

PERIOD = 0.5  # seconds between two looks


@dataclass
class Watched:
    """What was seen of a process: seconds since its start, with resident bytes of its own and of files."""

    seconds: list[float] = field(default_factory=list)
    private: list[int] = field(default_factory=list)
    mapped: list[int] = field(default_factory=list)
    status: int = 0

    def peak(self) -> tuple[int, int]:
        """(private, mapped and resident) bytes where their sum was largest."""
        return max(zip(self.private, self.mapped, strict=True), key=sum)


def watch(command: list[str], period: float = PERIOD, once: bool = False, **popen: object) -> Watched:
    """Runs the command, its output on the terminal unless `popen`'s arguments say otherwise.

    once: a page that the process maps several times counts once; of one that other processes map, too, the
    part that is its share. A look then takes 0.1 s for 20 GB.
    """
    seen, started = Watched(), time.perf_counter()
    process = psutil.Popen(command, **popen)
    try:
        while process.poll() is None:
            _look(process, time.perf_counter() - started, seen, once)
            time.sleep(period)
    finally:
        if process.poll() is None:  # this one was interrupted
            process.terminate()
        seen.status = process.wait()
    return seen


def _look(process: psutil.Popen, now: float, seen: Watched, once: bool) -> None:
    try:
        memory = process.memory_full_info() if once else process.memory_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
        return
    seen.seconds.append(now)
    seen.private.append(memory.rss - memory.shared)
    seen.mapped.append(max(0, memory.pss - seen.private[-1]) if once else memory.shared)
