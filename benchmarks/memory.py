"""Peak resident memory of this process, from Linux's own counters."""

from __future__ import annotations

import re
from pathlib import Path


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE).group(1)) * 1024


def resident() -> int:
    return _status("VmRSS")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    return _status("VmHWM")
