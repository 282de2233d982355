"""A script for torchrun, which tests/test_placement.py launches: trainers make the process group themselves.

python -m torch.distributed.run --nproc-per-node 2 placed_torchrun.py DIRECTORY     (has trainer1, sft1)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import placed_trainers
import torch.distributed as dist
import transformers


class Here(NamedTuple):
    """This process, as torchrun says."""

    rank: int
    world: int
    directory: Path


def main(directory: Path) -> None:
    transformers.logging.set_verbosity_error()
    assert not dist.is_initialized()
    here = Here(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), directory)
    placed_trainers.trainer(here)
    placed_trainers.sft_trainer(here)
    assert dist.get_backend() == "gloo" and dist.get_world_size() == here.world > 1
    (directory / f"done{here.rank}").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
