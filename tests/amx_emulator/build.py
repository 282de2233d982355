"""Compiles the emulator when it is out of date and prints its path.

LD_PRELOAD=$(python tests/amx_emulator/build.py) MOELORA_ISA=amx_bf16 python -m pytest tests -m operators
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parents[1] / "build" / "amx_emulator"


def compile_c(source: str, output: str, *flags: str) -> Path:
    """build/amx_emulator/`output` from `source` beside this file."""
    made, made_from = OUTPUT / output, HERE / source
    if made.exists() and made.stat().st_mtime > made_from.stat().st_mtime:
        return made
    OUTPUT.mkdir(parents=True, exist_ok=True)
    # Two test runs at once must not see half a file.
    partial = OUTPUT / f"{output}.{os.getpid()}"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, "-O2", "-Wall", "-Wextra", "-Werror", *flags, "-o", str(partial), str(made_from)]
    done = subprocess.run([*command, "-ldl", "-lm"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
    partial.replace(made)
    return made


def library() -> Path:
    path = compile_c("amx_emulator.c", "libamx_emulator.so", "-shared", "-fPIC", "-fvisibility=hidden")
    if any(c in str(path) for c in " :"):
        raise RuntimeError(f"LD_PRELOAD cannot name a path with spaces or colons: {path}")
    return path


def needless() -> bool:
    """Whether the CPU has AMX. The emulator cannot stand in for it: LDTILECFG raises no signal even where
    Linux has not granted the tiles.
    """
    cpus = Path("/proc/cpuinfo")
    return cpus.exists() and "amx_tile" in cpus.read_text()


def environment() -> dict[str, str]:
    """What to set for a process that is to run the AMX kernels."""
    preload = {} if needless() else {"LD_PRELOAD": str(library())}
    return {"MOELORA_ISA": "amx_bf16"} | preload


if __name__ == "__main__":
    print(library())
