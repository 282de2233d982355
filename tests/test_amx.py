"""AMX on this machine: the report, the override, and the emulator."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from amx_emulator import build

import torch_moelora

CPU = torch_moelora.info()["cpu"]

emulated = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"),
    reason="the emulator is for Linux on x86-64",
)
# Its configurations never get to the emulator.
without_amx = pytest.mark.skipif(
    "amx_bf16" in CPU["detected"], reason="the CPU performs AMX instructions itself"
)
with_kernels = pytest.mark.skipif(
    "avx512_bf16" not in CPU["usable"], reason="the AMX kernels pack with AVX-512-BF16"
)


def run(*args: str, timeout: int = 120, **environ: str) -> subprocess.CompletedProcess:
    without = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "MOELORA_ISA")}
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, env=without | environ, timeout=timeout)


@pytest.fixture(scope="module")
def probe() -> Path:
    return build.compile_c("probe.c", "probe")


@emulated
@without_amx
@pytest.mark.parametrize("name", ["right", "subnormal"])
def test_emulator_is_exact(probe, name):
    environ = os.environ | {"LD_PRELOAD": str(build.library())}
    assert subprocess.run([probe, name], env=environ, timeout=120).returncode == 0


@emulated
@without_amx
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unconfigured", "without a configuration"),
        ("released", "without a configuration"),
        ("rows", "A and C differ in rows"),
        ("columns", "B and C differ in columns"),
        ("depth", "A's pairs are not B's rows"),
        ("no_pairs", "no whole pairs"),
        ("unused_tile", "not configured"),
        ("same_tile", "not distinct"),
        ("too_large", "too large"),
        ("no_rows", "rows without bytes, or bytes without rows"),
        ("palette", "palette above 1"),
        ("reserved", "reserved bytes"),
    ],
)
def test_emulator_kills_wrong_programs(probe, name, message):
    environ = os.environ | {"LD_PRELOAD": str(build.library())}
    done = subprocess.run([probe, name], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode < 0, "a wrong program ran to its end"
    assert message in done.stderr


@emulated
def test_emulator_passes_other_signals_on():
    """What is no tile instruction still is illegal, and a handler installed for that is called."""
    code = (
        "import faulthandler, ctypes, mmap\n"
        "faulthandler.enable()\n"
        "page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "page.write(b'\\x0f\\x0b')\n"
        "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\n"
    )
    done = run("-c", code, LD_PRELOAD=str(build.library()))
    assert done.returncode < 0
    assert "Illegal instruction" in done.stderr


def cpu_report(**environ: str) -> dict:
    done = run("-m", "torch_moelora", "--json", **environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["cpu"]


@emulated
@with_kernels
def test_report_with_the_emulator():
    cpu = cpu_report(LD_PRELOAD=str(build.library()))
    for part in ("built", "detected", "permitted", "usable"):
        assert "amx_bf16" in cpu[part], part
    assert cpu["chosen"] == {"bf16": "amx_bf16"} | {t: CPU["chosen"][t] for t in ("fp16", "fp32", "fp64")}
    assert "amx_bf16" not in cpu["reasons"]


@emulated
@with_kernels
def test_a_lesser_set_can_be_asked_for():
    assert (
        cpu_report(LD_PRELOAD=str(build.library()), MOELORA_ISA="avx512_bf16")["chosen"]["bf16"]
        == "avx512_bf16"
    )


def test_report_without_the_emulator():
    cpu = cpu_report()
    if "amx_bf16" in cpu["usable"]:
        assert cpu["chosen"]["bf16"] == "amx_bf16"
    else:
        reason = cpu["reasons"]["amx_bf16"]
        assert "amx_bf16" not in cpu["detected"] or "arch_prctl" in reason
        assert any(
            word in reason for word in ("CPUID", "XCR0", "avx512_bf16", "arch_prctl", "Linux", "not built")
        ), reason


def test_override_without_amx_is_an_import_error():
    reason = cpu_report()["reasons"].get("amx_bf16")
    if reason is None:
        pytest.skip("this machine has AMX")
    done = run("-c", "import torch_moelora", MOELORA_ISA="amx_bf16")
    assert done.returncode != 0
    assert f"ImportError: MOELORA_ISA=amx_bf16 cannot run here: {reason}" in done.stderr
