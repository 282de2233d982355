"""`make test`: the runs of the test suite, one after the other, and what came of them.

python tests/run.py                  every run that this machine can do
python tests/run.py suite triton     these
python tests/run.py --list           names and purposes
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import core_builds
from amx_emulator import build as amx_emulator

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "build" / "reports"
# The kernels' own AMX tests emulate for themselves, within the first run.
OPERATORS = ("tests", "-m", "operators", "--ignore=tests/test_amx_kernels.py")
QUICK, SPARSE = "--hypothesis-profile=quick", "--hypothesis-profile=sparse"
CORE = (
    "tests/test_core.py",
    "tests/test_ukernel.py",
    "tests/test_ukernel_tiles.py",
    "tests/test_drivers_numpy.py",
)
# What a run may set: it starts without what the caller's shell has of these.
OURS = ("MOELORA_ISA", "MOELORA_BACKEND", "MOELORA_AUTOTUNE", "MOELORA_TEST_CORE", "TRITON_INTERPRET")


def possible() -> str | None:
    return None


@dataclass(frozen=True)
class Run:
    """One pytest process. `prepare` builds what it needs and may add to the environment; `spare` says why it
    runs by name only, `note` what to know of its result.
    """

    name: str
    purpose: str
    pytest: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], dict[str, str]] = dict
    why_not: Callable[[], str | None] = possible
    spare: Callable[[], str | None] = possible
    note: str = ""


@dataclass
class Outcome:
    """What pytest reported; `error` where it could not even report."""

    run: Run
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    error: str = ""


def cpu() -> dict:
    from torch_moelora import _C

    return _C.isa_report()


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


def all_runs() -> list[Run]:
    best, *others = cpu()["usable"]
    return [
        Run("suite", f"everything, with the best instruction set ({best})", ("tests",)),
        *(Run(isa, f"the operators on {isa}", (*OPERATORS, QUICK), {"MOELORA_ISA": isa}) for isa in others),
        Run(
            "amx",
            "the operators on AMX, emulated",
            (*OPERATORS, QUICK),
            prepare=amx_emulator.environment,
            why_not=no_emulator,
        ),
        Run(
            "triton",
            "the operators through the Triton kernels, interpreted",
            (*OPERATORS, SPARSE),
            {"MOELORA_BACKEND": "triton", "TRITON_INTERPRET": "1"},
            why_not=no_triton,
        ),
        Run(
            "sanitizers",
            "micro-kernels and drivers under AddressSanitizer and UBSan",
            (*CORE, QUICK),
            prepare=core_builds.sanitized,
            why_not=core_builds.no_sanitizers,
        ),
        Run(
            "clang",
            "micro-kernels and drivers built by clang",
            (*CORE, QUICK),
            prepare=core_builds.with_clang,
            why_not=core_builds.no_clang,
        ),
        Run(
            "wide",
            "micro-kernels and drivers for AVX-512-BF16 and AMX, emulated on AVX2",
            (
                *CORE,
                "tests/test_wide_emulation.py",
                "tests/test_amx_kernels.py",
                *core_builds.WIDE_PACKAGE,
                QUICK,
            ),
            prepare=core_builds.wide,
            why_not=no_wide,
            spare=wide_is_real,
            note="on emulated AVX-512-BF16 and AMX",
        ),
    ]


def count(outcome: Outcome, report: Path, status: int) -> None:
    """Fills the outcome from pytest's JUnit file. A run that tests nothing has failed."""
    if not report.exists():
        outcome.error = f"pytest died with status {status}"
        return
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, bad, outcome.skipped = (
        sum(int(suite.get(key)) for suite in suites for key in keys)
        for keys in (("tests",), ("failures", "errors"), ("skipped",))
    )
    outcome.failed = bad
    outcome.passed = total - bad - outcome.skipped
    if status and not bad:
        outcome.error = f"pytest ended with status {status}"
    elif not outcome.passed and not bad:
        outcome.error = "no test ran"


def execute(run: Run) -> Outcome:
    start = time.monotonic()
    try:
        environ = run.environ | run.prepare()
    except (subprocess.CalledProcessError, RuntimeError, OSError) as error:
        return Outcome(run, time.monotonic() - start, error=f"not built: {error}")
    report = REPORTS / f"{run.name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *run.pytest]
    print(" ".join([*(f"{k}='{v}'" for k, v in environ.items()), "python", *command[1:]]), flush=True)
    inherited = {k: v for k, v in os.environ.items() if k not in OURS}
    status = subprocess.run(
        [*command, f"--junit-xml={report}"], cwd=ROOT, env=inherited | environ, stdin=subprocess.DEVNULL
    ).returncode
    outcome = Outcome(run, time.monotonic() - start)
    count(outcome, report, status)
    return outcome


def summarize(outcomes: list[Outcome], absent: list[tuple[Run, str]]) -> int:
    """Prints the table and the line of totals; returns the exit status."""
    print("\n=== summary")
    width = max(len(run.name) for run in [*(o.run for o in outcomes), *(run for run, _ in absent)])
    for o in outcomes:
        bad = o.failed or o.error
        numbers = f"{o.passed:5} passed {o.failed:4} failed {o.skipped:4} skipped {o.seconds:6.0f} s"
        result = "FAILED" if bad else "ok"
        print(f"{o.run.name:<{width}}  {result:<6}  {numbers}  {o.error or o.run.note}".rstrip())
    for run, reason in absent:
        print(f"{run.name:<{width}}  not here: {reason}")
    failed = sum(o.failed + bool(o.error) for o in outcomes)
    passed, skipped = sum(o.passed for o in outcomes), sum(o.skipped for o in outcomes)
    seconds = sum(o.seconds for o in outcomes)
    print(f"{passed} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s")
    return 1 if failed else 0


def main() -> int:
    runs = all_runs()
    parser = argparse.ArgumentParser(description="Runs the test suite in every way that this machine can.")
    parser.add_argument("names", nargs="*", metavar="run", help="runs to do; all by default")
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    args = parser.parse_args()
    if unknown := set(args.names) - {run.name for run in runs}:
        parser.error(f"no such run: {', '.join(sorted(unknown))}; see --list")
    if args.list:
        width = max(len(run.name) for run in runs)
        for run in runs:
            print(f"{run.name:<{width}}  {run.purpose}")
        return 0
    REPORTS.mkdir(parents=True, exist_ok=True)
    chosen = [run for run in runs if not args.names or run.name in args.names]
    reasons = [(run, run.why_not() or (None if run.name in args.names else run.spare())) for run in chosen]
    outcomes = []
    for run, reason in reasons:
        if reason is None:
            print(f"\n=== {run.name}: {run.purpose}", flush=True)
            outcomes.append(execute(run))
    return summarize(outcomes, [(run, reason) for run, reason in reasons if reason])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
