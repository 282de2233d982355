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
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

import psutil
import torch
from matplotlib.figure import Figure

from . import ceilings, memory
from .machine import Machine, find
from .results import slug
from .watch import Watched, watch

RESULTS = Path(__file__).parent / "results"
GB = 1e9
LOOKS = 2.0  # seconds between two looks at the memory


def forget(directory: Path) -> None:
    """Drops the checkpoint's files from the page cache, as after a restart."""
    for path in directory.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def logged(log: Path) -> tuple[list[float], list[float]]:
    """(seconds from the command to the first step's beginning and to each step's end, losses) of a run."""
    first, *entries = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    steps = [entry for entry in entries if "loss" in entry]
    return [first["seconds"], *(entry["seconds"] for entry in steps)], [entry["loss"] for entry in steps]


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
    fields += [slug(options.tag)] if options.tag else []
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
    away = memory.keep_away(int(options.less * GB)) if options.less else None
    print(shlex.join(tune), flush=True)
    seen = watch(tune, LOOKS, once=True)
    if seen.status:
        return seen.status
    after = ceilings.measure("bf16", "cpu", threads, None, None)
    found = _found(options, base, out, tune, seen, (before, after))
    found["memory_kept_away_by"] = away.by if away else None
    print(_told(found))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{stem(options, find('cpu', 'bf16'))}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    _draw(found, seen, path.with_suffix(".png"))
    print(f"wrote {path} and .png")
    return 0


def _anywhere(arguments: list[str], options: argparse.Namespace) -> str:
    """The command without where the checkpoint lay."""
    folder = str(options.folder)
    inside = (word == folder or word.startswith(f"{folder}/") for word in arguments)
    words = ["DIR" + w.removeprefix(folder) if i else w for w, i in zip(arguments, inside, strict=True)]
    return shlex.join(["python", *words])


def _found(options, base: Path, out: Path, tune: list[str], seen: Watched, ceiling: tuple) -> dict:
    """`ceiling`: before and after."""
    tokens, machine = options.rows * options.length, find("cpu", "bf16")
    times, losses = logged(out / "log.jsonl")
    # The first step reads the files and clears fresh memory.
    step = sorted(b - a for a, b in pairwise(times[1:]))
    median = step[len(step) // 2]
    flops = 4 * active_parameters(base) * tokens
    private, mapped = seen.peak()
    rate = max(found.rate for found in ceiling)
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
        "ceilings": ceiling[0].to_json(),
        "ceilings_at_the_end": ceiling[1].to_json(),
        "tokens_a_step": tokens,
        "step_seconds": {"median": median, "min": step[0], "max": step[-1], "steps": len(step)},
        "tokens_per_second": tokens / median,
        "model_flops_a_step": flops,
        "share_of_ceiling": flops / median / rate,
        "seconds_to_first_step": times[0],
        "seconds_to_end_of_first_step": times[1],
        "cold_file_cache": options.cold,
        "memory_kept_away_bytes": int(options.less * GB),
        "peak_private_bytes": private,
        "peak_mapped_bytes": mapped,
        "losses": losses,
        "held_out_loss": json.loads((out / "summary.json").read_text())["held_out_loss"],
        "memory_over_time": [
            [round(s, 1), p, m] for s, p, m in zip(seen.seconds, seen.private, seen.mapped, strict=True)
        ],
        "steps_at": times[1:],
    }


def _told(found: dict) -> str:
    private, mapped = found["peak_private_bytes"] / GB, found["peak_mapped_bytes"] / GB
    losses, held_out = found["losses"], found["held_out_loss"]
    rate = max(found[when]["rate"] for when in ("ceilings", "ceilings_at_the_end"))
    return (
        f"{found['tokens_per_second']:.1f} tokens/s in steps of {found['tokens_a_step']} tokens, "
        f"{100 * found['share_of_ceiling']:.0f} % of {rate / GB:.0f} GF/s; peak "
        f"{private + mapped:.1f} GB ({private:.1f} private, {mapped:.1f} mapped); "
        f"{found['seconds_to_first_step']:.0f} s to the first step, "
        f"{found['seconds_to_end_of_first_step']:.0f} s to its end; "
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, "
        f"on held-out text {held_out['base']:.3f} -> {held_out['tuned']:.3f}"
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
    ends = found["steps_at"]
    speeds = [found["tokens_a_step"] / (b - a) for a, b in pairwise(ends)]
    rates.plot(ends[1:], speeds, "o-", color="tab:orange", markersize=3, label="tokens/s of each step")
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
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache first")
    parser.add_argument("--tag", metavar="WORDS", help="a part of the result files' names: what is tuned how")
    parser.add_argument("--less", type=float, default=0.0, metavar="GB", help="memory to keep away")
    parser.add_argument("rest", nargs="*", help="after --: options of `finetune`, such as --rank")
    options = parser.parse_args(argv)
    if options.steps < 3:
        parser.error(f"--steps is {options.steps}, expected at least 3: the first does not count")
    options.arguments = sys.argv[1:] if argv is None else argv
    return options


if __name__ == "__main__":
    sys.exit(main())
