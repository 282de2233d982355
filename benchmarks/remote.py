"""The other end of `benchmarks.worker`."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

from .layer import Batch, Case
from .peers.base import Results, Runner

ROOT = Path(__file__).parent.parent


class Stopped(RuntimeError):
    """A process that took longer than it may; it has been ended."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"stopped after {seconds:g} s")
        self.seconds = seconds


class Remote:
    """A worker process, given `limit` seconds for each request. What it printed is shown only if it fails."""

    def __init__(self, python: str = sys.executable, threads: int = 1, limit: float | None = None) -> None:
        self.limit = limit
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            bufsize=1,
        )

    def ask(self, do: str, **request) -> dict:
        """Raises RuntimeError with what the process says if it fails, Stopped past the limit."""
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            # One line answers one request: nothing is left in the buffer of `stdout`.
            if not select.select([self.process.stdout], [], [], self.limit)[0]:
                self.process.kill()
                raise Stopped(self.limit)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"ended with status {self.process.wait()}"}
        if "error" in answer:
            raise RuntimeError(f"{answer['error']}\n{self._tail()}".rstrip())
        return answer

    def _tail(self) -> str:
        self.log.seek(0)
        return "".join(self.log.readlines()[-8:])

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


class RemoteRunner(Runner):
    """Stopped while it is not its turn: a pool that spins would slow the others down."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote
        self.control = psutil.Process(remote.process.pid)
        self.control.suspend()

    def _ask(self, *args, **request) -> dict:
        if self.remote.process.poll() is not None:
            raise RuntimeError("its process has ended")
        self.control.resume()
        try:
            return self.remote.ask(*args, **request)
        finally:
            if self.remote.process.poll() is None:
                self.control.suspend()

    def time(self, batch: Batch) -> tuple[float, ...]:
        return tuple(self._ask("time", case=batch.case.to_json())["seconds"])

    def results(self, batch: Batch) -> Results:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/results.pt"
            self._ask("results", case=batch.case.to_json(), path=path)
            return torch.load(path)

    def close(self) -> None:
        self.remote.close()


def try_out(contestant: str, case: Case, python: str, threads: int, limit: float) -> int:
    """Two steps in a fresh process, which is ended if loading or one step takes longer than `limit` seconds
    (Stopped). Returns peak bytes beyond the weights; what the first step leaves behind counts.
    """
    with Remote(python, threads, limit) as remote:
        remote.ask("load", contestant=contestant, case=case.to_json(), threads=threads)
        remote.ask("begin_peak", case=case.to_json())
        for _ in range(2):
            remote.ask("time", case=case.to_json())
        return remote.ask("peak")["bytes"]


def product_rates(dtypes: Iterable[str], limit: float) -> dict[str, float]:
    """`products.rate` of each on one thread, in processes of its own; 0 past `limit` seconds."""
    rates = {}
    for dtype in dtypes:
        with Remote(limit=limit) as remote:
            try:
                rates[dtype] = remote.ask("product_rate", dtype=dtype)["rate"]
            except Stopped:
                rates[dtype] = 0.0
    return rates
