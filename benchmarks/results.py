"""The files a run leaves: JSON, and a chart beside it."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import memory
from .ceilings import Ceilings
from .suite import Outcome

RECORDED = ("dtype", "lora_dtype", "routing", "tokens", "rank", "threads", "repeats", "warmups", "seed")


def _first_line(text: str) -> str:
    """Without what a process printed before it broke: that is for the terminal."""
    return text.splitlines()[0]


def as_json(outcome: Outcome, options: argparse.Namespace, machine: str, after: Ceilings) -> dict:
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
            "tolerance": check.tolerance,
            "passed": check.passed,
        }
        for check in outcome.checks
    ]
    named = ("shape", "contestant", "reason")
    return {
        "machine": machine,
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
        "checks": checks,
        "left_out": [dict(zip(named, note, strict=True)) for note in outcome.left_out],
        "broken": [dict(zip(named, map(_first_line, note), strict=True)) for note in outcome.broken],
    }


def stem(options: argparse.Namespace, machine: str) -> str:
    """Machine, dtype and shapes: the same command on the same machine replaces its own files."""
    names = [shape.name for shape in options.shape]
    shapes = "-".join(names) if len(names) <= 2 else f"{len(names)}-shapes"
    part = "_layer" if options.layer else "_operators" if options.operators else ""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    return f"{slug}_{options.dtype}_{shapes}{part}"


def save(found: dict, folder: Path, name: str) -> list[Path]:
    from .chart import draw

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    chart = draw(found, folder / f"{name}.png")
    return [path, chart] if chart else [path]
