"""Experts spread over 2 to 4 processes against one that has them all; placed_checks.py has the checks."""

import json
import os
import shutil
import subprocess
import sys

import placed_processes
import placed_torchrun
import pytest
from placed_processes import ENDING

CHECKS = [
    *((1, name) for name in ("trainer", "sft_trainer")),
    *(
        (2, name)
        for name in (
            "families", "packed_families", "accumulated_and_clipped", "sharded", "accelerated", "recomputed",
            "autocast", "several_forwards", "loaded", "trainer", "trainer_sharded", "sft_trainer",
        )
    ),
    *(
        (3, name)
        for name in (
            "families", "packed_families", "half", "unequal", "without_tokens", "before_adapters",
            "recomputed", "ordered", "wrong_arguments", "trainer_elsewhere", "lonely_save",
        )
    ),
    *((4, name) for name in ("families", "packed_families", "without_tokens", "loaded", "memory")),
    *((3, name) for name in ("failing", "failing_backward", "killed", *ENDING)),
]  # fmt: skip


def _run(directory, checks):
    names = [f"{world}.{name}" for world, name in checks]
    command = [sys.executable, placed_processes.__file__, str(directory), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-5000:]
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where each process has left what it found."""
    return _run(tmp_path_factory.mktemp("placed"), CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), CHECKS, ids=str)
def test_placed(runs, world, name):
    _passed(runs, world, name)


@pytest.mark.slow
def test_torchrun(runs, tmp_path):
    """transformers' and TRL's trainers, launched as users launch them: as one process."""
    for name in ("trainer1", "sft1"):
        shutil.copytree(runs / name, tmp_path / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, placed_torchrun.__file__, str(tmp_path)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert all((tmp_path / f"done{rank}").exists() for rank in range(2))


@pytest.mark.long
@pytest.mark.parametrize("name", ["keeps_nothing", "compiled"])  # the first of 500 steps
def test_placed_for_long(tmp_path, name):
    _passed(_run(tmp_path, [(2, name)]), 2, name)


def _passed(directory, world, name):
    for rank in range(world):
        if name in ("killed", *ENDING) and rank == 1:
            continue
        file = directory / f"{world}.{name}.{rank}.json"
        assert file.exists(), f"rank {rank} did not come to it"
        told = json.loads(file.read_text())["told"]
        assert not told, f"rank {rank}: {told}"
