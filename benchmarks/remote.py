"""The other end of `benchmarks.worker`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch

from .layer import Batch, Case
from .peers.base import Results, Runner

ROOT = Path(__file__).parent.parent


class Remote:
    """A worker process. What it printed is shown only if it fails."""

    def __init__(self, python: str = sys.executable, threads: int = 1) -> None:
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
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
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


def peak_memory(contestant: str, case: Case, python: str, threads: int) -> int:
    """Bytes beyond the weights, in a fresh process."""
    with Remote(python, threads) as remote:
        remote.ask("load", contestant=contestant, case=case.to_json(), threads=threads)
        return remote.ask("peak", case=case.to_json())["bytes"]
