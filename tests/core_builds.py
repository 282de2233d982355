"""Other builds of the native core, and what a process needs to test them instead of the installed one.

They are compiled more quickly: kernels that this CPU cannot run are compiled for warnings and errors alone.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from amx_emulator import build as amx_emulator

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = "address,undefined"
RACES = "thread"


@functools.cache
def cpu() -> dict:
    """What the core says of it; without the package, whose torch each run would wait for. A process that has
    done so cannot import the package any more.
    """
    (folder,) = importlib.util.find_spec("torch_moelora").submodule_search_locations
    (library,) = Path(folder).glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("_C", library)
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    return core.isa_report()


def unoptimised(instruction_sets: Iterable[str]) -> str:
    return f"-DMOELORA_UNOPTIMISED={';'.join(instruction_sets)}"


def _for_this_cpu() -> str:
    report = cpu()
    return unoptimised(name for name in report["built"] if name not in report["detected"])


def build(name: str, *options: str, targets: tuple[str, ...] = ()) -> dict[str, str]:
    """Compiles core and test module, or `targets`, into build/`name`, warnings as errors; returns the
    environment.
    """
    import pybind11

    folder = ROOT / "build" / name
    # cmake and ninja stand beside this Python, whether or not its environment is activated.
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    environ = os.environ | {"PATH": path}
    configure = [
        "cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "-DMOELORA_BUILD_OPS=OFF", "-DMOELORA_WERROR=ON",
        "-DMOELORA_FOR_TESTS=ON", f"-DMOELORA_OUTPUT_DIR={folder}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options,
    ]  # fmt: skip
    chosen = ["--target", *targets] if targets else []
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # runs side by side may share a build
        subprocess.run(configure, check=True, env=environ, stdout=subprocess.DEVNULL)
        subprocess.run(["cmake", "--build", folder, *chosen], check=True, env=environ)
    return {"MOELORA_TEST_CORE": str(folder)}


def _library(compiler: str, name: str) -> str | None:
    """The path of one of g++'s own libraries; it prints the bare name where it has none."""
    command = [compiler, f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


def _lacks(library: str) -> str | None:
    if not shutil.which("g++"):
        return "there is no g++"
    return None if _library("g++", library) else f"g++ comes without {library.removesuffix('.so')}"


def no_sanitizers() -> str | None:
    return _lacks("libasan.so")


def sanitized() -> dict[str, str]:
    options = ("-DCMAKE_CXX_COMPILER=g++", f"-DMOELORA_SANITIZE={SANITIZERS}", _for_this_cpu())
    environ = build("sanitize", *options)
    # libstdc++ beside it: ASan looks for __cxa_throw when it starts, before Python loads any C++.
    preloaded = [_library("g++", name) for name in ("libasan.so", "libstdc++.so")]
    return environ | {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MOELORA_TEST_SANITIZERS": SANITIZERS,
    }


def no_race_detector() -> str | None:
    """It needs its share of the address space free, which random addresses can take from it."""
    if reason := _lacks("libtsan.so"):
        return reason
    environ = os.environ | {"LD_PRELOAD": _library("g++", "libtsan.so")}
    command = [sys.executable, "-c", "import numpy"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
    return f"ThreadSanitizer cannot run Python here: {last}" if done.returncode else None


def race_checked() -> dict[str, str]:
    options = ("-DCMAKE_CXX_COMPILER=g++", f"-DMOELORA_SANITIZE={RACES}", _for_this_cpu())
    environ = build("races", *options)
    return environ | {
        "LD_PRELOAD": _library("g++", "libtsan.so"),
        "TSAN_OPTIONS": "halt_on_error=1",
        "MOELORA_TEST_SANITIZERS": RACES,
    }


def _clang() -> str | None:
    """The newest clang++ there is, from 16 on."""
    newest, best = None, 15
    for name in ["clang++", *(f"clang++-{n}" for n in range(16, 40))]:
        if path := shutil.which(name):
            text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            version = int(found.group(1)) if (found := re.search(r"version (\d+)", text)) else 0
            newest, best = (path, version) if version > best else (newest, best)
    return newest


def no_clang() -> str | None:
    return None if _clang() else "there is no clang++ from 16 on"


def with_clang() -> dict[str, str]:
    return build("clang", f"-DCMAKE_CXX_COMPILER={_clang()}", _for_this_cpu())


# For pytest: `torch_moelora` is the package that wide() has made.
WIDE_PACKAGE = ("-o", "pythonpath=build/wide")


def wide() -> dict[str, str]:
    """The kernels for AVX-512 and AMX on an AVX2 CPU: a core, and the package around a copy of it."""
    import torch

    torch_folder = Path(torch.__file__).parent
    options = ("-DMOELORA_BUILD_OPS=ON", f"-DMOELORA_TORCH_DIR={torch_folder}", unoptimised(["avx2"]))
    environ = build("wide", "-DMOELORA_EMULATE_WIDE=ON", *options)
    folder = Path(environ["MOELORA_TEST_CORE"])
    package = folder / "torch_moelora"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "torch_moelora", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for library in folder.glob("*.so"):
        shutil.copy(library, package)
    return environ | amx_emulator.environment() | {"MOELORA_TEST_WIDE_EMULATED": "1"}


def _wide_operations(*targets: str) -> dict[str, str]:
    options = ("-DMOELORA_EMULATE_WIDE=ON", unoptimised(["avx512", "avx512_bf16"]))
    return build("wide_operations", *options, targets=targets)


def wide_kernels() -> None:
    """Compiles the kernels for AVX-512 on the emulation, and nothing else."""
    _wide_operations("wide_kernels")


def wide_operations() -> Path:
    """The folder of libwide_real.so and libwide_emulated.so: tests/wide_emulation/operations.cpp."""
    return Path(_wide_operations("wide_real", "wide_emulated")["MOELORA_TEST_CORE"])
