"""Markers and hypothesis profiles of the whole suite."""

import pytest
from hypothesis import HealthCheck, settings

from torch_moelora.switches import SWITCHES

MARKERS = (
    "operators: kernels against reference.py; run again for each MOELORA_ISA",
    "slow: more than about five seconds",
)

if SWITCHES.backend == "triton":
    import triton_interpreter

    triton_interpreter.install()

# The same examples in every run, so that a red test is somebody's change; `search` looks for new ones.
_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=60, derandomize=True, **_COMMON)
settings.register_profile("quick", max_examples=15, derandomize=True, **_COMMON)
settings.register_profile("sparse", max_examples=4, derandomize=True, **_COMMON)
settings.register_profile("search", max_examples=500, **_COMMON)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
