"""`python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import json
import sys

import torch
from rich.console import Console

from . import ceilings, machine, memory, options, report, results
from .layer import DTYPES
from .suite import Suite

WIDTH = 200  # of tables that go to a file
TURN_SECONDS = 0.1  # for each ceiling, between the contestants' turns
DRIFT = 0.07  # a larger change of the ceilings is reported


def _measure(opts: argparse.Namespace, seconds: float = 1.0) -> ceilings.Ceilings:
    given = (value and value * 1e9 for value in (opts.rate, opts.bandwidth))
    return ceilings.measure(opts.dtype, opts.device, opts.threads, *given, seconds)


def _show_drift(console: Console, first: ceilings.Ceilings, after: ceilings.Ceilings) -> None:
    for name in ("rate", "bandwidth"):
        ratio = getattr(after, name) / getattr(first, name)
        if abs(ratio - 1) > DRIFT:
            console.print(f"[yellow]The machine was not quiet: at the end its {name} was {ratio:.0%} of that "
                          "at the start.[/yellow]", highlight=False)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    opts = options.parse(argv)
    torch.set_num_threads(opts.threads)
    console = Console(stderr=opts.json)
    if not console.is_terminal:
        console.width = WIDTH
    if opts.device == "cpu" and not opts.fresh_memory:
        memory.keep_freed(memory.spare_for(opts.shape, DTYPES[opts.dtype]))
    where = machine.find(opts.device, opts.dtype)
    limits = _measure(opts)
    report.show_ceilings(console, where, opts.dtype, opts.threads, limits)
    if memory.keeps_freed():
        console.print("freed memory stays with the process: --fresh-memory for malloc's default")
    with console.status("") as status:
        # A device's ceilings do not drift, and its memory may be full.
        meanwhile = (lambda: _measure(opts, TURN_SECONDS)) if opts.device == "cpu" else lambda: limits
        outcome = Suite(opts, limits, meanwhile, status.update).run()
    report.show(console, outcome)
    after = _measure(opts)
    _show_drift(console, limits, after)
    found = results.as_json(outcome, opts, where, after)
    if opts.json:
        print(json.dumps(found, indent=1))
    if outcome.rows and not opts.no_save:
        for line in results.save(found, opts.output, results.stem(opts, where)):
            console.print(line, highlight=False, soft_wrap=True)
    if not outcome.rows and not outcome.checks:
        console.print("nothing could run", style="red")
        return 2
    return 0 if outcome.clean else 1


if __name__ == "__main__":
    sys.exit(main())
