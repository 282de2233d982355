"""`python -m torch_moelora`: prints `torch_moelora.info()`; with `formats`, what the formats run on."""

import argparse
import json
import sys

from .report import info, rows
from .support import columns, matrix


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m torch_moelora", description="What torch_moelora can run on this machine."
    )
    parser.add_argument(
        "what", nargs="?", choices=["formats"], help="formats: weight formats by instruction set"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    if args.what:
        print(json.dumps(columns(), indent=2) if args.json else matrix())
        return 0
    report = info()
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    lines = rows(report)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        width = max(len(name) for name, _ in lines)
        print("\n".join(f"{name:<{width}}  {text}" for name, text in lines))
        return 0
    table = Table(title="torch_moelora", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
