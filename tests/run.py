"""`make test`: the runs of the test suite, side by side, and what came of them.

python tests/run.py                  every short run that this machine can do
python tests/run.py suite triton     these
python tests/run.py long             the long ones
python tests/run.py --list           names and purposes
python tests/run.py --here suite -x  one, as this very process; the rest goes to pytest
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import signal
import sys
import time

import rows
import side_by_side
from outcomes import Outcome, read, summarize
from rows import ROOT, Run

REPORTS = ROOT / "build" / "reports"
# What a run may set: none of them gets what the caller's shell has of these.
OURS = ("MOELORA_", "TRITON_INTERPRET")  # what their names begin with
# Tests about threads set their number; all others share the cores with the run beside them.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def become(run: Run, more: list[str]) -> None:
    """Builds what the run needs; this process then is its pytest."""
    environ = THREADS | run.environ | run.prepare()
    command = ["-m", "pytest", *run.pytest, *more]
    print(" ".join([*(f"{k}={shlex.quote(v)}" for k, v in environ.items()), "python", *command]), flush=True)
    # A caller that ignores interruptions (nohup) must not hand that down: tests send them.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.chdir(ROOT)
    os.execve(sys.executable, [sys.executable, *command], os.environ | environ)


def execute(processes: side_by_side.Processes, seed: list[str], run: Run) -> Outcome:
    """The run in a process of its own; its log is shown if it failed."""
    report, log = REPORTS / f"{run.name}.xml", REPORTS / f"{run.name}.log"
    report.unlink(missing_ok=True)
    print(f"{run.name}: {run.purpose}", flush=True)
    start = time.monotonic()
    command = [sys.executable, __file__, "--here", run.name, f"--junit-xml={report}", "--durations=10", *seed]
    status = processes.run(command, log, env=os.environ | {"CMAKE_BUILD_PARALLEL_LEVEL": "1"})
    outcome = read(run, report, status, time.monotonic() - start)
    if outcome.bad and not processes.ended:  # an interruption says nothing about it
        text = log.read_text(errors="replace")
        print(f"\n=== {run.name} FAILED: {log.relative_to(ROOT)}\n{text}=== end of {run.name}\n", flush=True)
    elif not outcome.bad:
        print(f"{run.name}: {outcome.passed} passed in {outcome.seconds:.0f} s", flush=True)
    return outcome


def chosen(names: list[str], runs: list[Run]) -> list[Run]:
    """All short ones by default; "long" stands for all long ones."""
    if not names:
        return [run for run in runs if not run.long]
    return [run for run in runs if run.name in names or (run.long and "long" in names)]


def reason_against(run: Run, names: list[str]) -> str | None:
    """This machine cannot do it, or need not and nobody has named it."""
    return run.why_not() or (None if run.name in names else run.spare())


def all_of(names: list[str], seed: list[str], runs: list[Run]) -> int:
    """Those that this machine can do, as many at a time as there are cores; then the summary."""
    start = time.monotonic()
    REPORTS.mkdir(parents=True, exist_ok=True)
    reasons = [(run, reason_against(run, names)) for run in chosen(names, runs)]
    with side_by_side.processes() as processes:
        calls = [
            functools.partial(execute, processes, seed, run) for run, reason in reasons if reason is None
        ]
        outcomes = side_by_side.in_order(calls, side_by_side.cores())
    absent = [(run, reason) for run, reason in reasons if reason]
    left = [] if names else [run for run in runs if run.long]
    return summarize(outcomes, absent, left, time.monotonic() - start)


def main() -> int:
    for name in [name for name in os.environ if name.startswith(OURS)]:
        del os.environ[name]
    runs = rows.all_runs()
    parser = argparse.ArgumentParser(description="Runs the test suite in every way that this machine can.")
    parser.add_argument(
        "names", nargs="*", metavar="run", help="runs to do, or long; all short ones by default"
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the runs that look for new examples",
    )
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    parser.add_argument(
        "--here", nargs=argparse.REMAINDER, metavar="run", help="this run alone; what follows goes to pytest"
    )
    args = parser.parse_args()
    named = {*args.names, *(args.here or [])[:1]}
    if unknown := named - {"long"} - {run.name for run in runs}:
        parser.error(f"no such run: {', '.join(sorted(unknown))}; see --list")
    if args.list:
        width = max(len(run.name) for run in runs)
        for run in runs:
            print(f"{run.name:<{width}}  {run.purpose}{' (long)' * run.long}")
        return 0
    if args.here:
        become(next(run for run in runs if run.name == args.here[0]), args.here[1:])
    seed = [] if args.seed is None else [f"--hypothesis-seed={args.seed}"]
    return all_of(args.names, seed, runs)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
