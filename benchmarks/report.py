"""What a run found, as tables on the terminal."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.table import Table

from .ceilings import Ceilings
from .machine import Machine
from .rows import Row, StoppedRow
from .suite import Outcome

LEFT = ("shape", "operator", "contestant", "routing", "worst", "of")


def format_ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.3g}"


def _share(share: float) -> str:
    return f"{share:.0%}" if share else ""


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    return table


def _rate_unit(ceilings: Ceilings) -> tuple[float, str]:
    return (1e12, "TF/s") if ceilings.rate >= 1e13 else (1e9, "GF/s")


def show_ceilings(console: Console, machine: Machine, dtype: str, threads: int, ceilings: Ceilings) -> None:
    scale, unit = _rate_unit(ceilings)
    why = f" (MOELORA_ISA={machine.asked_for})" if machine.asked_for else ""
    console.print(f"[bold]{machine}[/bold], {threads} threads", highlight=False)
    console.print(f"instruction set for {dtype}: {machine.instruction_set}{why}", highlight=False)
    if machine.asked_for:
        console.print("others use what torch takes: ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY limit it")
    console.print(f"peak {ceilings.rate / scale:.0f} {unit}: {ceilings.rate_by}", highlight=False)
    console.print(f"bandwidth {ceilings.bandwidth / 1e9:.1f} GB/s: {ceilings.bandwidth_by}", highlight=False)


def show_checks(console: Console, outcome: Outcome) -> None:
    """The layer's, and whatever failed."""
    shown = [check for check in outcome.checks if check.part == "layer" or not check.passed]
    rounded = any(check.original for check in shown)
    columns = ["shape", "of", "contestant", "T", "r", "worst", "error", "tolerance", ""]
    columns += ["y beside the\noriginal weights"] if rounded else []
    table = _table("Correctness, before timing: relative error against torch_moelora.reference", columns)
    for check in shown:
        name, error = check.worst
        verdict = "[green]pass[/green]" if check.passed else "[red]FAIL: not timed[/red]"
        table.add_row(
            check.case.shape.name, check.part, check.contestant, str(check.case.tokens), str(check.case.rank),
            name, f"{error:.1e}", f"{check.tolerance:.0e}", verdict,
            *([f"{check.original['y']:.1e}" if check.original else ""] if rounded else []),
        )  # fmt: skip
    if shown:
        console.print(table)
    silent = len(outcome.checks) - len(shown)
    if silent:
        console.print(f"{silent} checks of single operators passed", highlight=False)


def _times(row: Row) -> list[str]:
    t = row.timing
    return [
        format_ms(t.median),
        f"{format_ms(t.minimum)} | {format_ms(t.first_quartile)}–{format_ms(t.third_quartile)}",
    ]


def _limits(row: Row) -> list[str]:
    scale, _ = _rate_unit(row.ceilings)
    rate = f"{row.flops / row.timing.median / scale:.3g}" if row.flops else ""
    return [format_ms(row.floor), rate, _share(row.of_peak), _share(row.of_bandwidth)]


def _against_balanced(rows: list[Row]) -> dict[int, float]:
    """Row's id → its time over that of balanced routing, where both were timed."""
    keys = {id(row): (row.case.tokens, row.case.rank, row.part, row.contestant) for row in rows}
    balanced = {keys[id(r)]: r.timing.median for r in rows if r.case.routing == "balanced"}
    if all(row.case.routing == "balanced" for row in rows):
        return {}
    return {id(r): r.timing.median / balanced[keys[id(r)]] for r in rows if keys[id(r)] in balanced}


def _grouped(rows: list[Row | StoppedRow]) -> list[list[Row | StoppedRow]]:
    """By tokens and rank, as the first of each come."""
    groups: dict[tuple[int, int], list] = {}
    for row in rows:
        groups.setdefault((row.case.tokens, row.case.rank), []).append(row)
    return list(groups.values())


def show_layer(console: Console, rows: list[Row | StoppedRow], ceilings: Ceilings) -> None:
    """One shape, whole layer."""
    ratios = _against_balanced([row for row in rows if isinstance(row, Row)])
    _, unit = _rate_unit(ceilings)
    columns = ["T", "r", "routing", "contestant", "ms", "min | quartiles", "fwd + bwd", "floor ms", unit,
               "of peak", "of bw", "GB beyond\nweights", "GB of\nweights"]  # fmt: skip
    title = f"{rows[0].case.shape.name}, {rows[0].case.dtype}: whole layer, forward + backward"
    table = _table(title, [*columns, "× balanced"] if ratios else columns)
    for group in _grouped(rows):
        for row in group:
            case = row.case
            cells = [str(case.tokens), str(case.rank), case.routing, row.contestant]
            if isinstance(row, StoppedRow):
                table.add_row(*cells, f"stopped after {row.seconds:g} s")
                continue
            forward, backward = row.timing.phases
            cells += [*_times(row), f"{format_ms(forward)} + {format_ms(backward)}", *_limits(row)]
            cells.append("" if row.memory is None else f"{row.memory / 1e9:.2f}")
            cells.append(f"{row.weights / 1e9:.2f}")
            table.add_row(*cells, *([f"{ratios[id(row)]:.2f}"] if id(row) in ratios else []))
        table.add_section()
    console.print(table)


def show_operators(console: Console, rows: list[Row], ceilings: Ceilings) -> None:
    """One shape, operator by operator."""
    _, unit = _rate_unit(ceilings)
    columns = ["T", "r", "routing", "operator", "contestant", "ms", "min | quartiles", "floor ms", unit,
               "of peak", "of bw"]  # fmt: skip
    table = _table(f"{rows[0].case.shape.name}, {rows[0].case.dtype}: single operators", columns)
    for _, group in groupby(rows, key=lambda row: (row.case.tokens, row.case.rank, row.case.routing)):
        for row in group:
            case = row.case
            cells = [str(case.tokens), str(case.rank), case.routing, row.part, row.contestant]
            table.add_row(*cells, *_times(row), *_limits(row))
        table.add_section()
    console.print(table)


def show(console: Console, outcome: Outcome) -> None:
    show_checks(console, outcome)
    every = [*outcome.rows, *outcome.stopped]
    for shape in dict.fromkeys(row.case.shape.name for row in every):
        rows = [row for row in every if row.case.shape.name == shape]
        layer = [row for row in rows if row.part == "layer"]
        operators = [row for row in rows if row.part != "layer"]
        if layer:
            show_layer(console, layer, outcome.ceilings)
        if operators:
            show_operators(console, operators, outcome.ceilings)
    for contestant, other, reason in outcome.replaced:
        console.print(f"{other} in place of {contestant}: {reason}", highlight=False, markup=False)
    for shape, contestant, reason in outcome.left_out:
        console.print(f"{shape}: without {contestant}: {reason}", highlight=False, markup=False)
    for shape, contestant, reason in outcome.broken:
        console.print(f"{shape}: {contestant} broke: {reason}", style="red", highlight=False, markup=False)
