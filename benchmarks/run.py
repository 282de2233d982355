"""`python -m benchmarks.run --help`."""

from __future__ import annotations

import sys

import torch
from rich.console import Console

from . import ceilings, options, report
from .suite import Suite


def _ceilings(opts) -> ceilings.Ceilings:
    found = ceilings.measure(opts.dtype, opts.device, opts.threads)
    if opts.rate:
        found.rate, found.rate_by = opts.rate * 1e9, "as given"
    if opts.bandwidth:
        found.bandwidth, found.bandwidth_by = opts.bandwidth * 1e9, "as given"
    return found


def main(argv: list[str] | None = None) -> int:
    opts = options.parse(argv)
    torch.set_num_threads(opts.threads)
    console = Console(stderr=opts.json)
    if not console.is_terminal:
        console.width = 150
    limits = _ceilings(opts)
    report.show_ceilings(console, ceilings.machine_name(opts.device), limits)
    with console.status("") as status:
        outcome = Suite(opts, limits, status.update).run()
    report.show(console, outcome)
    return 0 if all(check.passed for check in outcome.checks) else 1


if __name__ == "__main__":
    sys.exit(main())
