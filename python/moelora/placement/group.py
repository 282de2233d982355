"""The processes that share a model's experts: a group of their own, and what is told when one of them fails.

The group is not the caller's, so that DDP's reductions in the same backward cannot come between. A rank that
fails or ends leaves a note in torch.distributed's store; one that lost the others reads the notes, and knows
itself from which exchange it heard of them last.
"""

from __future__ import annotations

import atexit
import itertools
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

from moelora.errors import MoeloraError, one_line

PATIENCE = 5.0  # seconds in which ranks that are alive say so, after an exchange has failed
_NUMBERS = itertools.count()  # the same on all ranks, since `place` is called by all
_GROUPS: weakref.WeakSet[Group] = weakref.WeakSet()


class Group:
    """The ranks that share experts. Copies of a model share it.

    rank, size: of this process, in the group. calls: forwards that train and loads so far, which are the same
    on all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise MoeloraError("place needs torch.distributed: call init_process_group on every rank before")
        group = group or dist.group.WORLD
        ranks = dist.get_process_group_ranks(group)
        self.timeout = _timeout(group)
        number, backend = next(_NUMBERS), dist.get_backend_config(group)
        self._devices = set(dist.BackendConfig(dist.Backend(backend)).get_device_backend_map())
        self.own = dist.new_group(
            ranks,
            timeout=self.timeout,
            backend=backend,
            use_local_synchronization=True,
            group_desc=f"moelora_{number}",
        )
        self.rank, self.size = dist.get_rank(self.own), len(ranks)
        self.calls = self._meetings = 0
        store = dist.distributed_c10d._get_default_store()
        self._notes = dist.PrefixStore(f"moelora/{number}/{ranks[0]}", store)
        self._seen = ["place"] * self.size  # the last exchange in which something came from each rank
        self._told = False  # whether the others can read what became of this rank
        _GROUPS.add(self)

    def __deepcopy__(self, memo: dict) -> Group:
        return self

    def exchange(self, rows: Tensor, sent: list[int], received: list[int], where: str) -> Tensor:
        """Rows to each rank, `sent[r]` of them, in order of ranks; what came, `received[r]` from each.

        By way of the host where the group's backend does not reach the rows' device.

        Raises: MoeloraError that names the rank that did not take part.
        """
        device = rows.device
        rows = rows if device.type in self._devices else rows.cpu()
        found = rows.new_empty((sum(received), *rows.shape[1:]))
        try:
            dist.all_to_all_single(found, rows.contiguous(), received, sent, group=self.own)
        except RuntimeError as error:
            raise MoeloraError(self._diagnosis(where, error)) from error
        self._seen = [
            where if rank == self.rank or many else before
            for rank, (many, before) in enumerate(zip(received, self._seen, strict=True))
        ]
        return found.to(device)

    @contextmanager
    def telling(self, where: str) -> Iterator[None]:
        """What is raised inside is left for the other ranks to read, too."""
        try:
            yield
        except _StopRecomputationError:  # checkpoint's own way to end a recomputation
            raise
        except Exception as error:
            self._note("failed", f"failed in {where}: {type(error).__name__}: {one_line(error)}")
            raise

    def all_here(self, what: str, seconds: float = 60.0) -> None:
        """Wait until all ranks are here, `seconds` and the group's time-out at most.

        Raises: MoeloraError on those that waited in vain.
        """
        self._meetings += 1
        limit = time.monotonic() + min(seconds, self.timeout.total_seconds())
        self._notes.set(f"{what}/{self._meetings}/{self.rank}", "here")
        missing = set(range(self.size))
        while missing:
            missing = {r for r in missing if not self._notes.check([f"{what}/{self._meetings}/{r}"])}
            if missing and time.monotonic() > limit:
                raise MoeloraError(f"{what} must be called on all ranks, and {_ranks(missing)} did not")
            if missing:
                time.sleep(0.01)

    def tell_the_end(self) -> None:
        """This process ends: whoever waits for it now, or will, can read why."""
        error = getattr(sys, "last_value", None)  # what nobody caught, as Python prints it
        told = "" if error is None else f" with {type(error).__name__}: {one_line(error)}"
        if not self._told:
            self._note("failed", f"ended after {self._seen[self.rank]}{told}")

    def _note(self, kind: str, text: str) -> None:
        self._told = True
        try:
            self._notes.set(f"{kind}/{self.rank}", text)
        except RuntimeError:  # the store went with the process that had it
            return

    def _diagnosis(self, where: str, error: Exception) -> str:
        """Who failed, as far as the notes tell."""
        self._note("waited", where)
        others = [rank for rank in range(self.size) if rank != self.rank]
        limit = time.monotonic() + min(PATIENCE, self.timeout.total_seconds())
        try:
            while True:
                failed = self._read("failed", others)
                waited = self._read("waited", others)
                silent = [rank for rank in others if rank not in failed and rank not in waited]
                if failed or not silent or time.monotonic() > limit:
                    break
                time.sleep(0.05)
        except RuntimeError:
            return (
                f"{where}: a rank is gone, and with it torch.distributed's store (rank 0's process has it "
                f"unless torchrun does): {one_line(error)}"
            )
        if failed:
            told = "; ".join(f"rank {rank} {text}" for rank, text in failed.items())
        elif silent:
            last = "; ".join(f"rank {rank} was last heard of in {self._seen[rank]}" for rank in silent)
            told = f"{_ranks(silent)} did not come to the exchange: it ended, or is elsewhere; {last}"
        else:
            told = "the ranks are out of step: " + "; ".join(f"rank {r} is in {t}" for r, t in waited.items())
        return f"{told}. Rank {self.rank} was in {where}: {one_line(error)}"

    def _read(self, kind: str, ranks: list[int]) -> dict[int, str]:
        keys = {rank: f"{kind}/{rank}" for rank in ranks}
        return {r: self._notes.get(key).decode() for r, key in keys.items() if self._notes.check([key])}


@atexit.register  # after torch's own, so it comes before them
def _tell_all() -> None:
    for group in _GROUPS:
        group.tell_the_end()


def _ranks(ranks: Any) -> str:
    several = sorted(ranks)
    return f"rank{'s' * (len(several) > 1)} {', '.join(map(str, several))}"


def _timeout(group: dist.ProcessGroup) -> timedelta:
    """That of the caller's group, which a new one does not take over by itself."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    return group._get_backend(torch.device(device)).options._timeout
