"""Compiles the late device when it is out of date."""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parents[1] / "build" / "late_device"
SOURCES = ("device.cpp", "operators.cpp")


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stderr}")


def library() -> Path:
    """build/late_device/liblate-VERSION-OF-TORCH.so."""
    made = OUTPUT / f"liblate-{torch.__version__}.so"
    newest = max(path.stat().st_mtime for path in HERE.iterdir() if path.suffix in (".cpp", ".h"))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # runs side by side share it
        if made.exists() and made.stat().st_mtime > newest:
            return made
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        flags = ["-std=c++20", "-O1", "-g0", "-fPIC", "-Wall", "-Werror", abi]
        included = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        objects = []
        for source in SOURCES:
            objects.append(OUTPUT / f"{source}.o")
            _run(*compiler, *flags, *included, "-c", HERE / source, "-o", objects[-1])
        folders = cpp_extension.library_paths()
        linked = [flag for path in folders for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        partial = OUTPUT / "partial.so"
        _run(*compiler, "-shared", *objects, *linked, "-ltorch_cpu", "-lc10", "-o", partial)
        partial.replace(made)
    return made
