"""Processes over gloo for tests/test_placement.py: imports once, then forks as many as each check needs.

python placed_processes.py DIRECTORY CHECK...     a CHECK is `world.name`; writes DIRECTORY/outcomes.json
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import placed_checks
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState

ENDING = ("raises_in_attention", "raises_in_dataloader", "raises_in_optimizer")  # rank 1, as scripts end
ALONE = ("killed", "failing", "failing_backward", "memory", "keeps_nothing", *ENDING)  # not after others
WAITING = ("killed", "failing", "failing_backward")  # most of their time: beside each other
LIMIT = 400.0  # seconds for the checks of one number of processes


class Here(NamedTuple):
    """One process of a check."""

    rank: int
    world: int
    directory: Path


def process(here: Here, names: list[str]) -> None:
    """All checks of one number of processes; what each of them raised goes to a file."""
    torch.set_num_threads(1)
    start = {"init_method": f"file://{here.directory}/store{here.world}{names[0]}", "rank": here.rank}
    timeout = timedelta(seconds=5 if names[0] in ALONE else 120)
    if here.world > 1:  # as torchrun does
        os.environ |= {"RANK": str(here.rank), "LOCAL_RANK": str(here.rank), "ACCELERATE_USE_CPU": "1"}
        os.environ |= {"WORLD_SIZE": str(here.world), "LOCAL_WORLD_SIZE": str(here.world)}
        dist.init_process_group("gloo", **start, world_size=here.world, timeout=timeout)
    for name in names:
        if name in ENDING and here.rank == 1:
            getattr(placed_checks, name)(here)
        begun = time.monotonic()
        try:
            getattr(placed_checks, name)(here)
            told = ""
        except Exception:
            told = traceback.format_exc()
        outcome = {"told": told, "seconds": time.monotonic() - begun}
        (here.directory / f"{here.world}.{name}.{here.rank}.json").write_text(json.dumps(outcome))
        if told:  # the others may be waiting for this one
            break
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        gc.collect()


def start(world: int, directory: Path, names: list[str]) -> dict[int, int]:
    """Process id → rank."""
    found = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            if names[0] in ENDING and rank == 1:
                sys.exit(process(Here(rank, world, directory), names))
            status = 1
            try:
                process(Here(rank, world, directory), names)
                status = 0
            finally:
                os._exit(status)
        found[pid] = rank
    return found


def wait(found: dict[int, int]) -> list[int]:
    """The exit status of each process; negative: the signal that ended it."""
    status, limit = [-1] * len(found), time.monotonic() + LIMIT
    while found and time.monotonic() < limit:
        for pid in list(found):
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                status[found.pop(pid)] = os.waitstatus_to_exitcode(code)
        time.sleep(0.02)
    for pid in found:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return status


def main(directory: Path, names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    placed_checks.prepare(directory)
    if any(name.endswith(".memory") for name in names):
        placed_checks.prepare_large(directory)
    checks = [(int(world), name) for world, _, name in (name.partition(".") for name in names)]
    gc.collect()
    gc.freeze()  # what all have in common: each check ends with a collection
    waiting = []
    for (world, _), group in groupby(checks, key=lambda check: (check[0], check[1] * (check[1] in ALONE))):
        names = [name for _, name in group]
        processes = start(world, directory, names)
        if names[0] in WAITING:
            waiting.append((world, processes))
        else:
            print(world, wait(processes), flush=True)
    for world, processes in waiting:
        print(world, wait(processes), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
