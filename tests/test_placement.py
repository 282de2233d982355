"""Experts spread over 1 to 4 processes against one process that has them all; the checks are placed_checks.py's."""

import json
import subprocess
import sys

import placed_processes
import pytest

CHECKS = [
    *((1, name) for name in ("trainer", "sft_trainer")),
    *(
        (2, name)
        for name in (
            "families", "packed_families", "accumulated_and_clipped", "sharded", "recomputed", "autocast",
            "several_forwards", "compiled", "loaded", "trainer", "sft_trainer",
        )
    ),
    *(
        (3, name)
        for name in (
            "families", "packed_families", "half", "unequal", "before_adapters", "recomputed", "ordered",
            "wrong_arguments", "trainer_elsewhere", "lonely_save",
        )
    ),
    *((4, name) for name in ("families", "packed_families", "unequal", "loaded")),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each process found."""
    directory = tmp_path_factory.mktemp("placed")
    names = [f"{world}.{name}" for world, name in CHECKS]
    command = [sys.executable, placed_processes.__file__, str(directory), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-5000:]
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), CHECKS, ids=lambda value: str(value))
def test_placed(runs, world, name):
    for rank in range(world):
        file = runs / f"{world}.{name}.{rank}.json"
        assert file.exists(), f"rank {rank} did not come to it"
        told = json.loads(file.read_text())["told"]
        assert not told, f"rank {rank}: {told}"
