"""The files a run leaves: JSON, and a chart beside it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import memory
from .ceilings import Ceilings
from .machine import Machine
from .suite import Outcome

# Of torch and the libraries in it: what limits the instruction sets of others than ours.
TORCH_SWITCHES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
RECORDED = (
    "dtype", "lora_dtype", "routing", "tokens", "rank", "threads", "repeats", "warmups", "seed", "limit"
)  # fmt: skip


def _first_line(text: str) -> str:
    """Without what a process printed before it broke: that is for the terminal."""
    return text.splitlines()[0]


def command(options: argparse.Namespace, machine: Machine) -> str:
    switches = {name: os.environ[name] for name in TORCH_SWITCHES if name in os.environ}
    if machine.asked_for:
        switches["MOELORA_ISA"] = machine.asked_for
    words = [f"{name}={value}" for name, value in switches.items()]
    return shlex.join([*words, "python", "-m", "benchmarks.run", *options.arguments])


def as_json(outcome: Outcome, options: argparse.Namespace, machine: Machine, after: Ceilings) -> dict:
    """`after`: the ceilings measured again at the end; far from the first, the machine was not quiet."""
    ceilings = outcome.ceilings
    checks = [
        {
            "shape": check.case.shape.name,
            "part": check.part,
            "contestant": check.contestant,
            "tokens": check.case.tokens,
            "rank": check.case.rank,
            "relative_errors": check.errors,
            "relative_errors_to_original_weights": check.original,
            "tolerance": check.tolerance,
            "passed": check.passed,
        }
        for check in outcome.checks
    ]
    named, swapped = ("shape", "contestant", "reason"), ("contestant", "by", "reason")
    return {
        "machine": str(machine),
        "processor": machine.to_json(),
        "instruction_set": machine.instruction_set,
        "command": command(options, machine),
        "device": options.device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "versions": outcome.versions,
        "freed_memory_is_kept": memory.keeps_freed(),
        "spare_memory_bytes": memory.spare(),
        "options": {name: getattr(options, name) for name in RECORDED},
        "shapes": {shape.name: asdict(shape) for shape in options.shape},
        "ceilings": ceilings.to_json(),
        "ceilings_at_the_end": after.to_json(),
        "rows": [row.to_json() for row in outcome.rows],
        "stopped": [row.to_json() for row in outcome.stopped],
        "checks": checks,
        "replaced": [dict(zip(swapped, note, strict=True)) for note in outcome.replaced],
        "left_out": [dict(zip(named, note, strict=True)) for note in outcome.left_out],
        "broken": [dict(zip(named, map(_first_line, note), strict=True)) for note in outcome.broken],
    }


def slug(text: str) -> str:
    """Lower-case words with hyphens, without marks such as (R)."""
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", " ", text.lower())).strip("-")


def stem(options: argparse.Namespace, machine: Machine) -> str:
    """Machine with its cores, instruction set, dtype, shapes, part, and threads where not one for each core:
    the same command on the same machine replaces its own files, and another machine's of the same name only
    where both computed with the same instruction set.
    """
    names = [slug(shape.name) for shape in options.shape]
    shapes = "-".join(names) if len(names) <= 2 else f"{len(names)}-shapes"
    part = "layer" if options.layer else "operators" if options.operators else "all"
    part += "-formats" if options.format else ""
    fields = [slug(str(machine)), slug(machine.instruction_set), options.dtype, shapes, part]
    if options.device == "cpu" and options.threads != machine.cores:
        fields.append(f"{options.threads}-threads")
    return "_".join(fields)


def save(found: dict, folder: Path, name: str) -> list[str]:
    """Writes JSON and chart; says what was written, and in whose place."""
    from .chart import draw

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    before = ""
    if path.exists():
        old = json.loads(path.read_text())
        before = f" in place of {old['machine']}'s of {old['date']}"
    path.write_text(json.dumps(found, indent=1) + "\n")
    chart = draw(found, folder / f"{name}.png")
    return [f"wrote {path}{before}", *([f"wrote {chart}"] if chart else [])]
