"""Tables on the terminal, and the JSON file."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .ceilings import Ceilings
from .rows import Row
from .suite import Check, Outcome


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.3g}"


def show_ceilings(console: Console, machine: str, ceilings: Ceilings) -> None:
    console.print(f"[bold]{machine}[/bold]")
    console.print(f"peak {ceilings.rate / 1e9:.0f} GF/s ({ceilings.rate_by})", highlight=False)
    console.print(f"bandwidth {ceilings.bandwidth / 1e9:.1f} GB/s ({ceilings.bandwidth_by})", highlight=False)


def show_checks(console: Console, checks: list[Check]) -> None:
    table = Table(title="Correctness, before timing: relative error against torch_moelora.reference")
    for name in ("shape", "rows", "r", "contestant", "worst", "error", "tolerance", ""):
        table.add_column(name, justify="left" if name in ("shape", "contestant", "worst") else "right")
    for check in checks:
        name, error = check.worst
        verdict = "[green]pass[/green]" if check.passed else "[red]FAIL: not timed[/red]"
        rows = str(check.case.tokens * check.case.shape.top_k)
        table.add_row(
            check.case.shape.name, rows, str(check.case.rank), check.contestant, name,
            f"{error:.1e}", f"{check.tolerance:.0e}", verdict,
        )  # fmt: skip
    console.print(table)


def _layer_cells(row: Row, ceilings: Ceilings, balanced: float | None) -> list[str]:
    t = row.timing
    forward, backward = t.phases
    cells = [
        row.contestant, _ms(t.median), f"{_ms(t.minimum)} {_ms(t.first_quartile)}–{_ms(t.third_quartile)}",
        f"{_ms(forward)} + {_ms(backward)}", _ms(row.floor), f"{row.flops / t.median / 1e9:.0f}",
        f"{row.of_peak(ceilings):.0%}", f"{row.of_bandwidth(ceilings):.0%}",
        "" if row.memory is None else f"{row.memory / 1e9:.2f}",
    ]  # fmt: skip
    return cells if balanced is None else [*cells, f"{t.median / balanced:.2f}"]


def show_layer(console: Console, rows: list[Row], ceilings: Ceilings) -> None:
    """One table for the whole layer; with balanced among several routings, the ratio to it."""
    balanced = {
        (r.case.shape.name, r.case.tokens, r.case.rank, r.contestant): r.timing.median
        for r in rows
        if r.case.routing == "balanced"
    }
    compare = bool(balanced) and any(r.case.routing != "balanced" for r in rows)
    table = Table(title="Whole layer, forward + backward")
    left = ("shape", "contestant", "routing")
    names = ["shape", "T", "r", "routing", "contestant", "ms", "min, quartiles", "fwd + bwd", "floor ms",
             "GF/s", "of peak", "of bw", "GB beyond weights"]  # fmt: skip
    for name in [*names, "vs balanced"] if compare else names:
        table.add_column(name, justify="left" if name in left else "right")
    last = None
    for r in rows:
        case = r.case
        key = (case.shape.name, case.tokens, case.rank)
        if last is not None and key != last:
            table.add_section()
        last = key
        base = balanced.get((*key, r.contestant)) if compare else None
        cells = [case.shape.name, str(case.tokens), str(case.rank), case.routing]
        table.add_row(*cells, *_layer_cells(r, ceilings, base))
    console.print(table)


def show(console: Console, outcome: Outcome) -> None:
    show_checks(console, outcome.checks)
    layer = [row for row in outcome.rows if row.part == "layer"]
    if layer:
        show_layer(console, layer, outcome.ceilings)
    for shape, contestant, reason in outcome.skipped:
        console.print(f"{shape}: without {contestant}: {reason}", highlight=False)
