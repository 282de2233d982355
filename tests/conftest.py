"""Markers and hypothesis profiles of the whole suite."""

import pytest
from hypothesis import HealthCheck, settings

from torch_moelora.switches import SWITCHES

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


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SWITCHES.backend == "triton":
        for item in items:
            if item.get_closest_marker("long_interpreted"):
                item.add_marker("long")
