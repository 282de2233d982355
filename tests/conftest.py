"""Markers and hypothesis profiles of the whole suite."""

import functools
import gc
import sys
import time

import pytest
from hypothesis import HealthCheck, settings

from torch_moelora.switches import SWITCHES

# Its device would be everybody's accelerator: in a process of its own, where it is asked for by name.
ALONE = "test_beside"
collect_ignore_glob = [] if any(ALONE in argument for argument in sys.argv) else [f"{ALONE}*"]

MARKERS = (
    "operators: kernels against reference.py; run again for each MOELORA_ISA",
    "slow: more than about five seconds",
    "long: for `make test RUNS=long`, not for the short runs",
    "long_interpreted: long in Triton's interpreter; the short run meets the same code there in fewer ways",
)

if SWITCHES.backend == "triton":
    import triton_interpreter

    triton_interpreter.install()

# The same examples in every run, so that a red test is a change; `search` and `fuzz` look for new ones.
_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=60, derandomize=True, **_COMMON)
settings.register_profile("quick", max_examples=15, derandomize=True, **_COMMON)
settings.register_profile("sparse", max_examples=4, derandomize=True, **_COMMON)
settings.register_profile("search", max_examples=1500, **_COMMON)
settings.register_profile("fuzz", max_examples=200, **_COMMON)
settings.load_profile("default")
# Seconds for all tests that draw examples, in the profiles that look for new ones: each has its share of what
# is left, and draws no more once that is over.
SECONDS = {"search": 600, "fuzz": 600}
LEAST = 10  # examples that a test draws all the same


class Budget:
    """Shares time out among tests."""

    def __init__(self, seconds: float) -> None:
        self.left, self.tests, self.until, self.drawn, self.failed = seconds, 0, 0.0, 0, False

    def limit(self, function) -> None:
        """Let a test's examples be empty when its time is over, but not while a failure is made small."""
        inner, self.tests = function.hypothesis.inner_test, self.tests + 1
        if getattr(inner, "limited", False):
            return  # another row of the same test

        @functools.wraps(inner)
        def limited(*args, **kwargs):
            self.drawn += 1
            if self.failed or self.drawn <= LEAST or time.monotonic() < self.until:
                before, self.failed = self.failed, True
                inner(*args, **kwargs)
                self.failed = before

        limited.limited = True
        function.hypothesis.inner_test = limited

    def start(self) -> float:
        started = time.monotonic()
        self.until, self.drawn, self.failed = started + self.left / max(self.tests, 1), 0, False
        return started

    def stop(self, started: float) -> None:
        self.left, self.tests = max(self.left - (time.monotonic() - started), 0), self.tests - 1


def pytest_unconfigure() -> None:
    gc.unfreeze()


BUDGET = pytest.StashKey[Budget | None]()


def _draws(item: pytest.Item) -> bool:
    return hasattr(getattr(item, "obj", None), "hypothesis")


@pytest.hookimpl(trylast=True)  # of those that were selected
def pytest_collection_finish(session: pytest.Session) -> None:
    # What has been imported stays: no collection of garbage need go through it.
    gc.collect()
    gc.freeze()
    seconds = SECONDS.get(session.config.getoption("--hypothesis-profile", None))
    budget = session.config.stash[BUDGET] = None if seconds is None else Budget(seconds)
    for item in session.items if budget is not None else ():
        if _draws(item):
            budget.limit(item.obj)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    budget = item.config.stash[BUDGET]
    if budget is None or not _draws(item):
        return (yield)
    started = budget.start()
    try:
        return (yield)
    finally:
        budget.stop(started)


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SWITCHES.backend == "triton":
        for item in items:
            if item.get_closest_marker("long_interpreted"):
                item.add_marker("long")
