"""A whole model of full size: made with random weights, fine-tuned, and measured from outside.

python -m benchmarks.full_size --model qwen3-30b-a3b --format nf4 --nested

makes the checkpoint if it is not there, runs `python -m moelora finetune` on it and samples the memory of
that process. Writes JSON and a chart to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import psutil
import torch
from matplotlib.figure import Figure

from . import ceilings
from .machine import Machine, find
from .results import slug

RESULTS = Path(__file__).parent / "results"
PERIOD = 0.5  # seconds between two looks at the memory
GB = 1e9


@dataclass
class Watched:
    """What was seen of a run: seconds since its start, with what."""

    seconds: list[float] = field(default_factory=list)
    private: list[int] = field(default_factory=list)
    mapped: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)  # when each was logged
    log: list[dict] = field(default_factory=list)
    status: int = 0

    def peak(self) -> tuple[int, int]:
        """(private, mapped and resident) bytes where their sum was largest."""
        return max(zip(self.private, self.mapped, strict=True), key=sum)


def watch(command: list[str], log: Path) -> Watched:
    """Runs the command, its output on the terminal."""
    seen, started, since = Watched(), time.perf_counter(), time.time()
    process = psutil.Popen(command)
    while process.poll() is None:
        now = time.perf_counter() - started
        try:
            memory = process.memory_info()
        except psutil.NoSuchProcess:
            break
        seen.seconds.append(now)
        seen.private.append(memory.rss - memory.shared)
        seen.mapped.append(memory.shared)
        fresh = log.exists() and log.stat().st_mtime > since  # and no earlier run's
        lines = log.read_text().splitlines() if fresh else []
        entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
        seen.steps += [now] * (len(entries) - len(seen.log))
        seen.log = entries
        time.sleep(PERIOD)
    seen.status = process.wait()
    return seen


def forget(directory: Path) -> None:
    """Drops the checkpoint's files from the page cache, as after a restart."""
    for path in directory.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def active_parameters(directory: Path) -> float:
    """Parameters that a token is multiplied by: the experts of its choice, and all else but the embedding."""
    from moelora import checkpoints
    from moelora.commands import inspect

    outline, config = checkpoints.outline(directory)
    found = inspect.cost(outline, config, 1, "both", 1)
    experts = sum(group.parameters for group in found.groups)
    embedding = outline.get_input_embeddings().weight
    tied = embedding is outline.get_output_embeddings().weight
    others = found.parameters - experts - (0 if tied else embedding.numel())
    return others + sum(group.parameters * group.top_k / group.experts for group in found.groups)


def _commands(options: argparse.Namespace, base: Path, out: Path) -> tuple[list[str], list[str]]:
    moelora = [sys.executable, "-m", "moelora"]
    make = [*moelora, "synthesize", options.model, str(base), "--format", options.format]
    make += ["--nested"] * options.nested + (["--layers", str(options.layers)] if options.layers else [])
    tune = [
        *(*moelora, "finetune", "--model", str(base), "--output", str(out), "--report-to", "jsonl"),
        "--overwrite",  # what an earlier run wrote, and nothing else
        *(
            "--seq-length",
            str(options.length),
            "--batch-size",
            str(options.rows),
            "--steps",
            str(options.steps),
        ),
        *("--held-out", "0.002", "--compare", "0", "--sample", "0"),
        *options.rest,
    ]
    return make, tune


def _checkpoint(options: argparse.Namespace) -> str:
    name = f"{options.model}-{options.format}{'-nested' * options.nested}"
    return name + (f"-{options.layers}-layers" if options.layers else "")


def stem(options: argparse.Namespace, machine: Machine) -> str:
    """Machine with its cores, instruction set, checkpoint, and what was made scarce."""
    fields = [slug(str(machine)), slug(machine.instruction_set), "full-size", _checkpoint(options)]
    fields += ["cold"] * options.cold + ([f"{options.less:g}-gb-less"] if options.less else [])
    return "_".join(fields)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    name = _checkpoint(options)
    base, out = options.folder / name, options.folder / f"{name}-tuned"
    make, tune = _commands(options, base, out)
    if not base.exists() and subprocess.call(make):
        return 1
    if options.cold:
        forget(base)
    threads = torch.get_num_threads()
    before = ceilings.measure("bf16", "cpu", threads, None, None)
    held = bytearray(int(options.less * GB))  # which this process keeps from the other
    held[::4096] = b"\1" * len(held[::4096])
    print(shlex.join(tune), flush=True)
    seen = watch(tune, out / "log.jsonl")
    if seen.status:
        return seen.status
    found = _found(options, base, tune, seen, before, ceilings.measure("bf16", "cpu", threads, None, None))
    print(_told(found))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{stem(options, find('cpu', 'bf16'))}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    _draw(found, seen, path.with_suffix(".png"))
    print(f"wrote {path} and .png")
    return 0


def _anywhere(arguments: list[str], options: argparse.Namespace) -> str:
    """The command without where the checkpoint lay."""
    return shlex.join(["python", *arguments]).replace(str(options.folder), "DIR")


def _found(options, base: Path, tune: list[str], seen: Watched, before, after) -> dict:
    tokens, machine = options.rows * options.length, find("cpu", "bf16")
    # The first step reads the files and clears fresh memory.
    step = sorted(b - a for a, b in zip(seen.steps[1:], seen.steps[2:], strict=False))
    median = step[len(step) // 2]
    flops = 4 * active_parameters(base) * tokens
    private, mapped = seen.peak()
    rate = max(before.rate, after.rate)
    return {
        "machine": str(machine),
        "instruction_set": machine.instruction_set,
        "processor": machine.to_json(),
        "memory_bytes": psutil.virtual_memory().total,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _anywhere(["-m", "benchmarks.full_size", *options.arguments], options),
        "finetune": _anywhere(tune[1:], options),
        "torch": torch.__version__,
        "file_bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")),
        "ceilings": before.to_json(),
        "ceilings_at_the_end": after.to_json(),
        "tokens_a_step": tokens,
        "step_seconds": {"median": median, "min": step[0], "max": step[-1], "steps": len(step)},
        "tokens_per_second": tokens / median,
        "model_flops_a_step": flops,
        "share_of_ceiling": flops / median / rate,
        "seconds_to_first_step": seen.steps[0],
        "cold_file_cache": options.cold,
        "memory_kept_away_bytes": int(options.less * GB),
        "peak_private_bytes": private,
        "peak_mapped_bytes": mapped,
        "losses": [entry["loss"] for entry in seen.log],
        "memory_over_time": [
            [round(s, 1), p, m] for s, p, m in zip(seen.seconds, seen.private, seen.mapped, strict=True)
        ],
        "steps_at": [round(s, 1) for s in seen.steps],
    }


def _told(found: dict) -> str:
    private, mapped = found["peak_private_bytes"] / GB, found["peak_mapped_bytes"] / GB
    losses = found["losses"]
    return (
        f"{found['tokens_per_second']:.1f} tokens/s in steps of {found['tokens_a_step']} tokens, "
        f"{100 * found['share_of_ceiling']:.0f} % of {found['ceilings']['rate'] / GB:.0f} GF/s; peak "
        f"{private + mapped:.1f} GB ({private:.1f} private, {mapped:.1f} mapped); "
        f"{found['seconds_to_first_step']:.0f} s to the end of the first step; "
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )


def _draw(found: dict, seen: Watched, path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    private, mapped = ([b / GB for b in which] for which in (seen.private, seen.mapped))
    axes.stackplot(
        seen.seconds, private, mapped, labels=("private", "pages of files"), colors=("#1b6ca8", "#a9cbe4")
    )
    axes.axhline(found["memory_bytes"] / GB, color="tab:gray", linestyle="--", label="the machine's")
    axes.set_xlabel("seconds since the command")
    axes.set_ylabel("resident memory, GB")
    rates = axes.twinx()
    speeds = [found["tokens_a_step"] / (b - a) for a, b in zip(seen.steps, seen.steps[1:], strict=False)]
    rates.plot(seen.steps[1:], speeds, "o-", color="tab:orange", markersize=3, label="tokens/s of each step")
    rates.set_ylabel("tokens/s")
    rates.set_ylim(0, 1.5 * max(speeds))  # below the line of the memory
    figure.suptitle(f"{path.stem.replace('_', ', ')}: {found['tokens_per_second']:.1f} tokens/s")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=__doc__)
    parser.add_argument("--model", default="qwen3-30b-a3b", help="a name that `synthesize` knows")
    parser.add_argument("--format", default="nf4", help="of the experts")
    parser.add_argument("--nested", action="store_true", help="nested scales")
    parser.add_argument("--layers", type=int, help="the first ones only, to try it out")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoint and adapter go")
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--rows", type=int, default=1, help="sequences in a step")
    parser.add_argument("--steps", type=int, default=8, help="at least 3")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
    parser.add_argument("--less", type=float, default=0.0, metavar="GB", help="memory to keep away")
    parser.add_argument("rest", nargs="*", help="after --: options of `finetune`, such as --rank")
    options = parser.parse_args(argv)
    if options.steps < 3:
        parser.error(f"--steps is {options.steps}, expected at least 3: the first does not count")
    options.arguments = sys.argv[1:] if argv is None else argv
    return options


if __name__ == "__main__":
    sys.exit(main())
