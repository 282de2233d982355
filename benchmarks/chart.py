"""The chart: how far each contestant is from the floor, and the memory it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = {
    "ours": "#1b6ca8",
    "ours-compiled": "#5fa8d3",
    "ours-batch-invariant": "#8fb8c8",
    "loop": "#e0a030",
    "loop-fp32": "#f0cf90",
    "peft": "#c0504d",
    "peft-fp32": "#e0a8a6",
    "kt-kernel": "#6a9955",
    "kt-kernel-mxfp4": "#a3c293",
    "grouped-mm": "#8064a2",
    "grouped-mm-fp32": "#bfb1d0",
    "scattermoe": "#7f7f7f",
}


PANEL = 8  # groups of bars side by side
MANY = 6  # contestants: more of them get narrow bars, and a legend beside them
BEYOND = "peak_memory_beyond_weights_bytes"
Group = tuple  # of what the rows of one group of bars have in common


def _group(row: dict) -> Group:
    return row["part"], row["shape"], row["tokens"], row["rank"], row["routing"]


def _label(group: Group) -> str:
    part, shape, tokens, rank, routing = group
    name = shape if part == "layer" else part.replace(" ", "\n")
    return f"{name}\nT={tokens} r={rank}\n{routing}"


def _text(row: dict) -> str:
    ms = row["seconds"]["median"] * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _bars(axes: Axes, rows: list[dict], height: Callable[[dict], float], text: Callable[[dict], str]) -> None:
    """One group of bars for each case, one bar for each contestant."""
    groups = list(dict.fromkeys(map(_group, rows)))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    width, many = 0.8 / len(names), len(names) > MANY
    colours = {name: plt.colormaps["tab20"](i % 20) for i, name in enumerate(names)} | COLOURS
    for i, name in enumerate(names):
        mine = [row for row in rows if row["contestant"] == name]
        at = [groups.index(_group(row)) + (i - (len(names) - 1) / 2) * width for row in mine]
        bars = axes.bar(at, [height(row) for row in mine], width * 0.92, label=name, color=colours[name])
        upright = {"rotation": 90} if many else {}
        axes.bar_label(bars, [text(row) for row in mine], fontsize=7, padding=2, **upright)
    axes.set_xticks(range(len(groups)), map(_label, groups), fontsize=7)
    axes.set_xlim(-0.5, max(len(groups), 1 if many else 4) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.margins(y=0.2 if many else 0.12)
    place = ("upper left", 1) if many else ("lower right", len(names))
    axes.legend(fontsize=7, frameon=False, loc=place[0], bbox_to_anchor=(1, 1), ncols=place[1])


def _draw_times(axes: Axes, rows: list[dict], title: str) -> None:
    over = [row["seconds"]["median"] / row["floor_seconds"] for row in rows]
    _bars(axes, rows, lambda row: row["seconds"]["median"] / row["floor_seconds"], _text)
    if max(over) > 20:
        axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=1)
    axes.set_ylabel("time / floor")
    axes.set_title(f"{title}: ms above the bars; the line is the machine's limit", loc="left", fontsize=9)


def _draw_memory(axes: Axes, rows: list[dict], title: str) -> None:
    _bars(axes, rows, lambda row: row[BEYOND] / 1e9, lambda row: f"{row[BEYOND] / 1e9:.2f}")
    axes.set_ylabel("GB")
    axes.set_title(title, loc="left", fontsize=9)


def _stopped(row: dict) -> str:
    what = f"{row['shape']} T={row['tokens']} r={row['rank']} {row['routing']}"
    return f"{row['contestant']}: {what} stopped after {row['after_seconds']:g} s"


def _chunks(rows: list[dict]) -> Iterator[list[dict]]:
    """Rows of at most PANEL groups at a time."""
    groups = list(dict.fromkeys(map(_group, rows)))
    for start in range(0, len(groups), PANEL):
        shown = groups[start : start + PANEL]
        yield [row for row in rows if _group(row) in shown]


def draw(found: dict, path: Path) -> Path | None:
    """Writes the PNG and returns its path; None where there is nothing to draw."""
    layer = [row for row in found["rows"] if row["part"] == "layer"]
    measured = [row for row in layer if row[BEYOND] is not None]
    # Routing is bound neither by arithmetic nor by bandwidth.
    single = [row for row in found["rows"] if row["part"] not in ("layer", "flatten_sort_count")]
    panels = [
        (draw_one, rows, title)
        for draw_one, every, title in (
            (_draw_times, layer, "Whole layer, forward + backward"),
            (_draw_memory, measured, "Whole layer, peak memory beyond the weights"),
            (_draw_times, single, "Single operators"),
        )
        for rows in _chunks(every)
    ]
    if not panels:
        return None
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 3.2 * len(panels)), squeeze=False, layout="constrained"
    )
    options = found["options"]
    isa = found["instruction_set"]
    lines = [f"{found['machine']}, {options['threads']} threads, {options['dtype']}, {isa}"]
    lines += [_stopped(row) for row in found["stopped"]]
    figure.suptitle("\n".join(lines), fontsize=10)
    for axis, (draw_one, rows, title) in zip(axes[:, 0], panels, strict=True):
        draw_one(axis, rows, title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
