"""What came of a run of the test suite: read from pytest's JUnit file, and the table of all of them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rows import Run


@dataclass
class Outcome:
    """What pytest reported; `error` where it could not even report."""

    run: Run
    seconds: float
    passed: int = 0
    failed: int = 0
    skips: Counter[str] = field(default_factory=Counter)  # reason → tests
    error: str = ""

    @property
    def bad(self) -> bool:
        return bool(self.failed or self.error)

    @property
    def skipped(self) -> int:
        return sum(self.skips.values())


def _reason(case: ElementTree.Element) -> str | None:
    """Why a test, or for a module skipped as a whole its collection, was skipped."""
    skipped = case.find("skipped")
    if skipped is None:
        return None
    message = skipped.get("message") or ""
    if message == "collection skipped":  # ('path', line, 'Skipped: reason') is its text
        message = (skipped.text or "").rpartition("Skipped: ")[2].rstrip("\"')")
    return message or "no reason given"


def read(run: Run, report: Path, status: int, seconds: float) -> Outcome:
    """A run that tests nothing has failed."""
    outcome = Outcome(run, seconds)
    if not report.exists():
        outcome.error = f"ended with status {status} before pytest reported"
        return outcome
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if reason := _reason(case):
            outcome.skips[reason] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            outcome.failed += 1
        else:
            outcome.passed += 1
    if status and not outcome.failed:
        outcome.error = f"pytest ended with status {status}"
    elif not outcome.passed and not outcome.failed:
        outcome.error = "no test ran"
    return outcome


def summarize(outcomes: list[Outcome], absent: list[tuple[Run, str]], left: list[Run], seconds: float) -> int:
    """Prints the table and the line of totals; returns the exit status. `left`: long runs that were not asked
    for.
    """
    print("\n=== summary")
    width = max(len(run.name) for run in [*(o.run for o in outcomes), *(run for run, _ in absent)])
    for o in outcomes:
        numbers = f"{o.passed:5} passed {o.failed:4} failed {o.skipped:4} skipped {o.seconds:6.0f} s"
        result = "FAILED" if o.bad else "ok"
        print(f"{o.run.name:<{width}}  {result:<6}  {numbers}  {o.error or o.run.note}".rstrip())
    for run, reason in absent:
        print(f"{run.name:<{width}}  not here: {reason}")
    if any(o.skips for o in outcomes):
        print("skipped:")
    for o in outcomes:
        for reason, tests in o.skips.most_common():
            print(f"{o.run.name:<{width}}  {tests:5}  {reason}")
    if left:
        print(f"long runs, not part of this (RUNS=long): {', '.join(run.name for run in left)}")
    failed = sum(max(o.failed, int(o.bad)) for o in outcomes)
    passed, skipped = sum(o.passed for o in outcomes), sum(o.skipped for o in outcomes)
    print(f"{passed} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s")
    return 1 if failed else 0
