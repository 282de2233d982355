"""Where implementations come from: the compiled library for CPU tensors, Triton for CUDA tensors.

Triton is imported by the first call on a CUDA tensor, never by `import torch_moelora`. Its module
`torch_moelora.triton.register` has a dict IMPLEMENTATIONS: operator name → function with the schema's
arguments.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from .schemas import SCHEMAS
from .switches import SWITCHES

LIBRARY = Path(__file__).parent / "libmoelora_ops.so"
REGISTER_MODULE = f"{__package__}.triton.register"


def load_cpu() -> None:
    """Loads the CPU implementations. Raises ImportError, with what to do, where they were not built."""
    if not LIBRARY.exists():
        raise ImportError(
            f"the compiled operators are missing: {LIBRARY} must exist. "
            "Run `make setup`, or `pip install --no-build-isolation -e .`, in the source tree."
        )
    torch.ops.load_library(str(LIBRARY))


def triton_unavailable() -> str | None:
    """Why the Triton kernels cannot be used, or None. Finds modules without importing Triton."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        found = importlib.util.find_spec(REGISTER_MODULE)
    except ModuleNotFoundError:
        found = None
    return None if found else "this build of torch_moelora has no Triton kernels"


@functools.cache
def _triton_implementations() -> dict[str, Callable]:
    reason = triton_unavailable()
    if reason:
        raise NotImplementedError(f"torch_moelora cannot run on CUDA tensors: {reason}")
    return importlib.import_module(REGISTER_MODULE).IMPLEMENTATIONS


def _on_first_call(name: str) -> Callable:
    def implementation(*args):
        return _triton_implementations()[name](*args)

    return implementation


def register(lib: torch.library.Library) -> None:
    """Gives every operator of `lib` its CPU and CUDA implementations."""
    keys = ["CUDA"]
    if SWITCHES.backend == "triton":
        keys.append("CPU")
    else:
        load_cpu()
    for key in keys:
        for name in SCHEMAS:
            lib.impl(name, _on_first_call(name), key)
