"""The environment variables that the Python side obeys, read once, at import. README, "Switches", documents
them.

`MOELORA_ISA` is read on the C++ side (csrc/dispatch/isa.cpp), and nowhere else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Switches:
    """backend: "triton", or None for the C++ kernels on CPU tensors. autotune: search Triton
    configurations. batch_invariant: what `set_batch_invariant` is called with at import.
    """

    backend: str | None
    autotune: bool
    triton_interpret: bool
    batch_invariant: bool = False


def read(environ: Mapping[str, str]) -> Switches:
    """Switches from `environ`. Raises ImportError on a value that means nothing."""
    backend = environ.get("MOELORA_BACKEND") or None
    if backend not in (None, "triton"):
        raise ImportError(f"MOELORA_BACKEND must be triton or unset, got {backend}")
    flags = {}
    for name in ("MOELORA_AUTOTUNE", "MOELORA_BATCH_INVARIANT", "TRITON_INTERPRET"):
        value = environ.get(name) or "0"
        if name.startswith("MOELORA") and value not in ("0", "1"):
            raise ImportError(f"{name} must be 0, 1 or unset, got {value}")
        flags[name] = value.lower() in ("1", "true", "on", "yes", "y")
    if backend == "triton" and not flags["TRITON_INTERPRET"]:
        raise ImportError(
            "MOELORA_BACKEND=triton must come with TRITON_INTERPRET=1, got TRITON_INTERPRET unset"
        )
    return Switches(
        backend, flags["MOELORA_AUTOTUNE"], flags["TRITON_INTERPRET"], flags["MOELORA_BATCH_INVARIANT"]
    )


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where this user's caches live on this platform; ours is a folder in it."""
    if sys.platform == "win32":
        base = environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "torch_moelora"


SWITCHES = read(os.environ)
