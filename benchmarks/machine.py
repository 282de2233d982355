"""What a run ran on: the processor by its own name, and the instruction set that computed."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """name: as the processor calls itself, with AMD's generation: "AMD EPYC (Zen 4)". family, model: CPUID's
    numbers, None where there are none. instruction_set: that of the kernels for the dtype at hand; on CUDA
    the compute capability. asked_for: MOELORA_ISA, if set.
    """

    name: str
    cores: int | None
    family: int | None
    model: int | None
    instruction_set: str
    asked_for: str | None

    def to_json(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return self.name if self.cores is None else f"{self.name}, {self.cores} cores"


def _cpuinfo() -> dict[str, str]:
    """Linux's description of the first processor."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    return {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }


def _zen(family: int, model: int) -> str | None:
    """AMD's generation, for virtual machines, where all call themselves "AMD EPYC": by the numbers in Linux,
    arch/x86/kernel/cpu/amd.c.
    """
    if family == 25:
        return "Zen 4" if model in range(0x10, 0x20) or model in range(0x60, 0xB0) else "Zen 3"
    return "Zen 5" if family == 26 else None


def find(device: str, dtype: str) -> Machine:
    """dtype: bf16, fp16 or fp32."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return Machine(torch.cuda.get_device_name(), None, None, None, f"sm_{major}{minor}", None)
    from torch_moelora import info

    cpu, known = info()["cpu"], _cpuinfo()
    family, model = (int(known[key]) if key in known else None for key in ("cpu family", "model"))
    name = known.get("model name") or platform.processor() or platform.machine()
    if known.get("vendor_id") == "AuthenticAMD" and (generation := _zen(family, model)):
        name = f"{name} ({generation})"
    return Machine(name, os.cpu_count(), family, model, cpu["chosen"][dtype], cpu["override"])
