"""Compiles what the operators would launch on a GPU that is not there: the host code runs on meta tensors,
and every launch becomes a compilation for the target.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from torch_moelora.triton import configs

# Table's name → (compute capability, shared memory a program may have: CUDA's programming guide).
TARGETS = {
    "sm_80": (80, 163 * 1024),
    "sm_86": (86, 99 * 1024),
    "sm_90": (90, 227 * 1024),
    "sm_100": (100, 227 * 1024),
}


class Driver:
    """What a launch asks of Triton's driver before it compiles. One device number a target, so that kernels
    compiled for one are not taken for another's.
    """

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target; `shape` are its constexprs and launch options that say which tile it is."""

    name: str
    shape: str
    ptx: str
    warps: int
    shared: int
    usage: dict[str, int]

    def __str__(self) -> str:
        return f"{self.name}[{self.shape}]"


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes a thread, as the assembler recorded them. Spills are on the stack."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    assert found.keys() == {"REG", "STACK", "LOCAL"}, text
    return {name: int(value) for name, value in found.items()}


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """torch's switch for TF32 products."""
    module = torch.backends.cuda.matmul
    before, module.allow_tf32 = module.allow_tf32, allowed
    try:
        yield
    finally:
        module.allow_tf32 = before


@contextlib.contextmanager
def compiling_for(arch: str, monkeypatch) -> Iterator[dict[str, Compiled]]:
    """Inside, launches compile for `arch` and are collected by Triton's hash of them."""
    capability, _ = TARGETS[arch]
    found: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in found:
            shape = ", ".join(f"{k}={v}" for k, v in kwargs.items())
            usage = resource_usage(kernel.asm["cubin"])
            found[kernel.hash] = Compiled(
                self.fn.__name__,
                shape,
                kernel.asm["ptx"],
                kernel.metadata.num_warps,
                kernel.metadata.shared,
                usage,
            )
        return kernel

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(configs, "machine", lambda device: configs.Machine(arch, 100, arch))
        patch.setattr(driver, "_active", Driver(capability))
        yield found


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory; Triton takes its address, 0, for an aligned one."""
    return torch.empty(shape, dtype=dtype, device="meta")
