"""`python -m benchmarks.gpu_proof`: all that only a GPU can show, in one command and under ten minutes.

Tests (tests/test_cuda*.py: real shapes, packed weights, 20 equal runs, beyond 2³¹ elements, CUDA graphs,
torch.compile, experts in host memory), the small ones again under compute-sanitizer, and the benchmarks. Each
step is a process with a log; what the time did not suffice for is named as such.
summary.json has it all, beside the benchmarks' own JSON and PNG.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from .options import RESULTS
from .registry import SHAPES

ROOT = Path(__file__).parents[1]
FIRST = "qwen3-30b-a3b"
WITHOUT_SEARCH = "ours,peft,grouped-mm"
# In several processes, for most of their time is compilation: as many as there are cores, and memory for the
# references.
TESTS = ("tests/test_cuda.py", "tests/test_cuda_layers.py", "tests/test_cuda_packed.py")
MEMORY = 14 << 30
# These need the memory, or the time, for themselves.
ALONE = ("tests/test_cuda_large.py", "tests/test_cuda_beside.py")
LEAST = 15  # seconds under which a step is not begun


@dataclass(frozen=True)
class Step:
    """A command that may take `limit` seconds. `why_not`: why it cannot be done here."""

    name: str
    command: tuple[str, ...]
    limit: float
    environ: tuple[tuple[str, str], ...] = ()
    why_not: str | None = None


@dataclass
class Outcome:
    """state: passed, failed, out of time or not here."""

    name: str
    state: str
    seconds: float = 0.0
    command: str = ""
    note: str = ""


def _pytest(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", "pytest", "-o", "addopts=", "-ra", *arguments


def _processes() -> int:
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return max(1, min(os.cpu_count() or 1, memory // MEMORY))


def _benchmark(folder: Path, shape: str, contestants: str, *arguments: str) -> tuple[str, ...]:
    return (
        sys.executable, "-m", "benchmarks.run", "--device", "cuda", "--output", str(folder),
        "--shape", shape, "--contestants", contestants, *arguments,
    )  # fmt: skip


def _beside(folder: Path, kind: str) -> tuple[str, ...]:
    command = "-m", "benchmarks.beside", "--tokens", "4096", "--format", kind, "--output", str(folder)
    return sys.executable, *command


def _sanitizer() -> str | None:
    """On the path, or beside the compiler of CUDA's usual place."""
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)


def make_steps(folder: Path) -> Iterator[Step]:
    """The most telling first. scattermoe searches its configurations for minutes: last, and kept apart."""
    for name, arguments in (("tests", (*TESTS, "-n", str(_processes()))), ("tests alone", ALONE)):
        report = f"--junit-xml={folder / name.replace(' ', '_')}.xml"
        yield Step(name, _pytest(*arguments, report), 240)
    sizes = ("--layer", "--rank", "16,64", "--repeats", "10")
    yield Step(f"layer {FIRST}", _benchmark(folder, FIRST, WITHOUT_SEARCH, *sizes), 120)
    formats = ("--format", "all", "--tokens", "512,4096")
    yield Step(f"formats {FIRST}", _benchmark(folder, FIRST, "ours", *formats), 120)
    for kind in ("dense", "nf4"):
        yield Step(f"beside {kind}", _beside(folder / f"beside-{kind}", kind), 60)
    yield Step(f"operators {FIRST}", _benchmark(folder, FIRST, "ours", "--operators", "--tokens", "4096"), 60)
    sanitizer = _sanitizer()
    # Each tensor in an allocation of its own: an access past its end is one past an allocation's. Weights
    # that are brought over run the same kernels, and had not ended after five minutes under the sanitizer.
    yield Step(
        "sanitizer",
        (sanitizer or "", "--tool", "memcheck", "--error-exitcode", "9",
         *_pytest(*TESTS, *ALONE, "-k", "test_small and not bring")),
        240,
        (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        None if sanitizer else "compute-sanitizer is not installed (it comes with the CUDA toolkit)",
    )  # fmt: skip
    for shape in SHAPES:
        if shape != FIRST:
            yield Step(f"layer {shape}", _benchmark(folder, shape, WITHOUT_SEARCH, *sizes), 120)
    alone = ("--layer", "--rank", "16", "--repeats", "10")
    command = _benchmark(folder / "scattermoe", FIRST, "ours,scattermoe", *alone)
    yield Step(f"scattermoe {FIRST}", command, 300)


def execute(step: Step, folder: Path, left: float) -> Outcome:
    """Runs it to its end, or to the end of its time; what it prints goes to a log."""
    if step.why_not:
        return Outcome(step.name, "not here", note=step.why_not)
    if left < LEAST:
        return Outcome(step.name, "out of time", note="not begun")
    start = time.monotonic()
    log = folder / f"{step.name.replace(' ', '_')}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=os.environ | dict(step.environ), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            state = "failed" if process.wait(min(step.limit, left)) else "passed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    seconds = round(time.monotonic() - start, 1)
    return Outcome(step.name, state, seconds, " ".join(step.command), f"log: {log.name}")


def save(folder: Path, outcomes: list[Outcome]) -> None:
    """After each step: what is known outlives whatever ends the run."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    found = {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(0)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")


def run(steps: Iterator[Step], folder: Path, seconds: float) -> list[Outcome]:
    end = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for step in steps:
        print(f"{step.name} …", flush=True)
        outcomes.append(execute(step, folder, end - time.monotonic()))
        last = outcomes[-1]
        print(f"  {last.state} in {last.seconds:.0f} s. {last.note}", flush=True)
        save(folder, outcomes)
    return outcomes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_proof", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<the GPU's name>")
    parser.add_argument("--seconds", type=float, default=585, help="for everything (default: 585)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "torch sees no CUDA device here: nothing was run, and nothing is shown about CUDA.",
            file=sys.stderr,
        )
        return 2
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    folder = (options.output or RESULTS / slug).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = run(make_steps(folder), folder, options.seconds)
    print(f"wrote {folder / 'summary.json'}")
    return 1 if any(outcome.state == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
