"""The table of runs: pytest on what, with what around it. They start in this order, the longest first."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import core_builds
from amx_emulator import build as amx_emulator
from core_builds import cpu

ROOT = Path(__file__).resolve().parents[1]
AMX_KERNELS = "tests/test_amx_kernels.py"
# Not the folder: what all other files import takes longer than many a test of the operators.
OPERATORS = (
    *(
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.operators" in path.read_text() and not path.match(AMX_KERNELS)
    ),
    "-m",
    "operators and not long",
)
# All that conftest.py keeps out of the suite.
BESIDE = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_beside*.py")))
# What starts processes of its own and waits for them.
TRAINING = (
    "tests/test_placement.py",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_finetune*.py"))),
)
AHEAD_OF_TIME = "tests/test_triton_aot.py"
QUICK, SPARSE, SEARCH, FUZZ = (
    f"--hypothesis-profile={name}" for name in ("quick", "sparse", "search", "fuzz")
)
DRIVERS = "tests/test_drivers_numpy.py"
THE_BUILD = "tests/test_ukernel.py::test_the_build_under_test"
CORE = (
    "tests/test_core.py",
    "tests/test_ukernel.py",
    "tests/test_ukernel_tiles.py",
    "tests/test_ukernel_unpack.py",
    DRIVERS,
)
TRITON = {"MOELORA_BACKEND": "triton", "TRITON_INTERPRET": "1"}


def possible() -> str | None:
    return None


@dataclass(frozen=True)
class Run:
    """One pytest process. `prepare` builds what it needs and may add to the environment; `why_not` says what
    the machine lacks for it, `spare` why it does not need it; `long` and spare ones run only when they are
    named. `note` is what to know of the result.
    """

    name: str
    purpose: str
    pytest: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], dict[str, str]] = dict
    why_not: Callable[[], str | None] = possible
    spare: Callable[[], str | None] = possible
    long: bool = False
    note: str = ""


def no_emulator() -> str | None:
    if "amx_bf16" in cpu()["usable"]:
        return "the CPU has AMX itself: the first run used it"
    return None if "avx512_bf16" in cpu()["usable"] else "the AMX kernels pack with AVX-512-BF16"


def no_wide() -> str | None:
    return None if "avx2" in cpu()["usable"] else "the emulation of AVX-512 needs AVX2"


def wide_is_real() -> str | None:
    return "the CPU has AVX-512-BF16 itself; by name it runs" if "avx512_bf16" in cpu()["usable"] else None


def no_triton() -> str | None:
    if not (ROOT / "torch_moelora" / "triton" / "register.py").exists():
        return "this tree has no Triton kernels"
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


def short_runs() -> list[Run]:
    best, *others = cpu()["usable"]
    return [
        Run(
            "suite",
            f"everything else, with the best instruction set ({best})",
            ("tests", *(f"--ignore={path}" for path in (AHEAD_OF_TIME, *TRAINING)), "-m", "not long"),
        ),
        Run("training", "the command `finetune`, and experts spread over processes",
            (*TRAINING, "-m", "not long")),
        Run("beside", "experts beside an accelerator, on a device that is late on purpose",
            BESIDE),
        # At real sizes the interpreter takes seconds a test: a long run has them.
        Run("triton", "the operators through the Triton kernels, interpreted",
            (*OPERATORS, SPARSE, "-k", "not real"), TRITON, why_not=no_triton),
        Run("compiled", "the Triton kernels, compiled for GPUs", (AHEAD_OF_TIME, "-m", "not long"),
            why_not=no_triton),
        Run("wide", "micro-kernels and drivers for AVX-512-BF16 and AMX, emulated on AVX2",
            (*CORE, "tests/test_wide_emulation.py", AMX_KERNELS, *core_builds.WIDE_PACKAGE, QUICK),
            prepare=core_builds.wide, why_not=no_wide, spare=wide_is_real,
            note="on emulated AVX-512-BF16 and AMX"),
        Run("sanitizers", "micro-kernels and drivers under AddressSanitizer and UBSan", (*CORE, QUICK),
            prepare=core_builds.sanitized, why_not=core_builds.no_sanitizers),
        # Ranges of values are no matter of threads, nor is what one has to itself.
        Run("races", "the drivers' threads under ThreadSanitizer",
            (DRIVERS, THE_BUILD, QUICK, "-s",
             "-k", "not whole_range and not are_dense_ones and not one_row_or_column"),
            prepare=core_builds.race_checked, why_not=core_builds.no_race_detector),
        Run("clang", "micro-kernels and drivers built by clang", (*CORE, QUICK),
            prepare=core_builds.with_clang, why_not=core_builds.no_clang),
        Run("amx", "the operators on AMX, emulated", (AMX_KERNELS, *OPERATORS, QUICK),
            prepare=amx_emulator.environment, why_not=no_emulator),
        *(
            Run(isa, f"the operators on {isa}, two threads", (*OPERATORS, QUICK),
                {"MOELORA_ISA": isa, "OMP_NUM_THREADS": "2"})
            for isa in others
        ),
    ]  # fmt: skip


def long_runs() -> list[Run]:
    return [
        Run("rest", "what is marked long: real sizes, leaks, every kernel for every GPU",
            ("tests", "-m", "long")),
        Run("interpreter", "every test of the operators through the Triton kernels, interpreted",
            (*OPERATORS[:-1], "operators", QUICK), TRITON, why_not=no_triton),
        Run("fuzz", "micro-kernels and drivers on new examples under AddressSanitizer and UBSan",
            (*CORE, FUZZ), prepare=core_builds.sanitized, why_not=core_builds.no_sanitizers),
        Run("search", "the operators on new examples", (*OPERATORS, SEARCH, "-k", "matches_reference")),
    ]  # fmt: skip


def all_runs() -> list[Run]:
    return [*short_runs(), *(replace(run, long=True) for run in long_runs())]
