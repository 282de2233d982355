"""The chart: how far each contestant is from the floor, and the memory it takes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = {
    "ours": "#1b6ca8",
    "ours-compiled": "#5fa8d3",
    "loop": "#e0a030",
    "peft": "#c0504d",
    "kt-kernel": "#6a9955",
    "grouped-mm": "#8064a2",
    "scattermoe": "#7f7f7f",
}


def _group(row: dict, several_routings: bool) -> str:
    name = row["shape"] if row["part"] == "layer" else row["part"].replace(" ", "\n")
    routing = f"\n{row['routing']}" if several_routings else ""
    return f"{name}\nT={row['tokens']} r={row['rank']}{routing}"


def _bars(axes: Axes, rows: list[dict], height, text) -> None:
    """One group of bars for each case, one bar for each contestant."""
    several = len({row["routing"] for row in rows}) > 1
    groups = list(dict.fromkeys(_group(row, several) for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = [row for row in rows if row["contestant"] == name]
        at = [groups.index(_group(row, several)) + (i - (len(names) - 1) / 2) * width for row in mine]
        bars = axes.bar(at, [height(row) for row in mine], width * 0.92, label=name, color=COLOURS[name])
        axes.bar_label(bars, [text(row) for row in mine], fontsize=7, padding=2, rotation=90)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(x=0.01, y=0.2)


def _ms(row: dict) -> str:
    return f"{row['seconds']['median'] * 1e3:,.3g} ms" if row["seconds"]["median"] < 0.1 else (
        f"{row['seconds']['median'] * 1e3:,.0f} ms"
    )  # fmt: skip


def _draw_times(axes: Axes, rows: list[dict], title: str) -> None:
    _bars(axes, rows, lambda row: row["seconds"]["median"] / row["floor_seconds"], _ms)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_ylabel("time / floor (1 = the machine's limit)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=4)


def _draw_memory(axes: Axes, rows: list[dict]) -> None:
    beyond = "peak_memory_beyond_weights_bytes"
    _bars(axes, rows, lambda row: row[beyond] / 1e9, lambda row: f"{row[beyond] / 1e9:.2f}")
    axes.set_ylabel("peak GB beyond the weights")


def draw(found: dict, path: Path) -> Path | None:
    """Writes the PNG and returns its path; None where there is nothing to draw."""
    layer = [row for row in found["rows"] if row["part"] == "layer"]
    single = [row for row in found["rows"] if row["part"] not in ("layer", "flatten_sort_count")]
    measured = [row for row in layer if row["peak_memory_beyond_weights_bytes"] is not None]
    panels = [rows for rows in (layer, measured, single) if rows]
    if not panels:
        return None
    groups = max(len({_group(row, True) for row in rows}) for rows in panels)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(max(8, 1.5 * groups), 4 * len(panels)), squeeze=False, layout="constrained"
    )
    rest = iter(axes[:, 0])
    about = f"{found['machine']}, {found['options']['threads']} threads, {found['options']['dtype']}"
    if layer:
        _draw_times(next(rest), layer, f"Whole layer, forward + backward. {about}")
    if measured:
        _draw_memory(next(rest), measured)
    if single:
        _draw_times(next(rest), single, f"Single operators. {about}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
