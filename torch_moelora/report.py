"""What this installation can run, and why the rest is unavailable."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import _C, backends
from .batch_invariance import is_batch_invariant
from .formats import FORMATS
from .switches import SWITCHES


def version() -> str:
    """The installed distribution's version; "unknown" for a source tree that was never installed."""
    try:
        return importlib.metadata.version("torch_moelora")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _cuda() -> dict:
    if not torch.backends.cuda.is_built():
        reason = "this torch was built without CUDA"
    elif not torch.cuda.is_available():
        reason = "torch finds no CUDA device or driver"
    else:
        reason = backends.triton_unavailable()
    devices = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            devices.append(f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return {"available": reason is None, "reason": reason, "toolkit": torch.version.cuda, "devices": devices}


def _triton() -> dict:
    reason = backends.triton_unavailable()
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found = None
    return {"available": reason is None, "reason": reason, "version": found}


def info() -> dict:
    """Versions, CPU instruction sets, threads, CUDA, Triton and switches, as plain dicts, lists and strings.

    `cpu` holds `built`, `detected`, `permitted` and `usable` (lists of instruction sets), `chosen` (dtype →
    the set its kernels use), `override` (MOELORA_ISA or None) and `reasons` (set → why it is not usable).
    `cuda` and `triton` hold `available` and, where that is False, a `reason`. `batch_invariant` is what is
    set now. `formats` are the names of the weight formats.
    """
    return {
        "versions": {
            "torch_moelora": version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "cpu": _C.isa_report(),
        "threads": torch.get_num_threads(),
        "batch_invariant": is_batch_invariant(),
        "formats": list(FORMATS),
        "cuda": _cuda(),
        "triton": _triton(),
        "switches": {
            "MOELORA_BACKEND": SWITCHES.backend,
            "MOELORA_AUTOTUNE": SWITCHES.autotune,
            "MOELORA_BATCH_INVARIANT": SWITCHES.batch_invariant,
        },
    }


def rows(report: dict) -> list[tuple[str, str]]:
    """`info()` as (name, value) lines for people."""
    cpu, cuda, triton = report["cpu"], report["cuda"], report["triton"]
    lines = [(name, text) for name, text in report["versions"].items()]
    lines.append(("threads", str(report["threads"])))
    lines.append(("batch invariant", "yes" if report["batch_invariant"] else "no"))
    for name in ("built", "detected", "permitted", "usable"):
        lines.append((f"instruction sets {name}", ", ".join(cpu[name]) or "none"))
    lines.append(("chosen", ", ".join(f"{dtype}: {isa}" for dtype, isa in cpu["chosen"].items())))
    lines.append(("MOELORA_ISA", cpu["override"] or "unset"))
    lines += [(f"{isa} unavailable", reason) for isa, reason in cpu["reasons"].items()]
    lines.append(("weight formats", ", ".join(report["formats"])))
    where = ", ".join(cuda["devices"])
    lines.append(("CUDA", where if cuda["available"] else f"unavailable: {cuda['reason']}"))
    lines.append(("Triton", triton["version"] if triton["available"] else f"unavailable: {triton['reason']}"))
    for name, value in report["switches"].items():
        lines.append((name, "1" if value is True else value or "unset"))
    return lines
