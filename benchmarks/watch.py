"""The memory of another process, looked at from outside while it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import psutil

PERIOD = 0.5  # seconds between two looks
RARELY = 6.0  # seconds between two looks at all pages, or a tenth of those so far


@dataclass
class Watched:
    """What was seen of a process: seconds since its start, with resident bytes of its own and of files."""

    seconds: list[float] = field(default_factory=list)
    private: list[int] = field(default_factory=list)
    mapped: list[int] = field(default_factory=list)
    status: int = 0
    pages_at: float = float("-inf")  # when they were last counted

    def peak(self) -> tuple[int, int]:
        """(private, mapped and resident) bytes where their sum was largest."""
        return max(zip(self.private, self.mapped, strict=True), key=sum)


def watch(command: list[str], period: float = PERIOD, once: bool = False, **popen: object) -> Watched:
    """Runs the command, its output on the terminal unless `popen`'s arguments say otherwise.

    once: a page that the process maps several times counts once; of one that other processes map, too, the
    part that is its share. That takes going through all pages, 0.2 s for 20 GB in which the process can map
    and free no memory: it is done every RARELY seconds or later, and the looks between have what it found.
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
    whole = once and now >= seen.pages_at + max(RARELY, now / 10)
    try:
        memory = process.memory_full_info() if whole else process.memory_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
        return
    seen.seconds.append(now)
    seen.private.append(memory.rss - memory.shared)
    if whole:
        seen.pages_at = now
        seen.mapped.append(max(0, memory.pss - seen.private[-1]))
    else:
        seen.mapped.append(seen.mapped[-1] if once else memory.shared)
