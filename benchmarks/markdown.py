"""`python -m benchmarks.markdown FILE...`: result files of one machine as the README's table.

Prints a block between two comments, the first of which names the files; with `--formats` first a table of
packed weights (of one file, of `benchmarks.run --format`), with `--whole` one of whole models (of files of
`benchmarks.full_size`, whichever machines'; patterns are expanded). `--update README.md` renders every
such block in that file anew; tests/test_readme.py checks that they are what their files give.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from . import whole_models
from .report import format_ms

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- python -m benchmarks\.markdown (.+?) -->\n.*?\n<!-- end -->", re.DOTALL)
HEADINGS = {
    "ours": "ours",
    "ours-compiled": "ours, `torch.compile`",
    "ours-batch-invariant": "ours, batch-invariant",
    "loop": "per-expert `torch.mm` loop",
    "loop-fp32": "per-expert `torch.mm` loop **in fp32**",
    "peft": "transformers `grouped_mm` + PEFT",
    "peft-fp32": "transformers `grouped_mm` + PEFT **in fp32**",
    "grouped-mm": "`grouped_mm` by hand",
    "grouped-mm-fp32": "`grouped_mm` by hand **in fp32**",
}
COPIES = {  # bitsandbytes' dense ones: when and for whom, by the end of the contestant's name
    "-loop": "dense copy, `torch.mm` loop",
    "-kept": "dense copy kept for the backward, our operators",
    "": "dense copies forward and backward, our operators",
}
FORMATS, WHOLE = "--formats", "--whole"
DENSE = "ours"  # the contestant
Key = tuple[str, int, int, str]  # shape, tokens, rank, routing


def _key(row: dict) -> Key:
    return row["shape"], row["tokens"], row["rank"], row["routing"]


def _heading(name: str, results: list[dict]) -> str:
    """Contestants that are packages go by name and version."""
    versions = [found["versions"][name] for found in results if name in found["versions"]]
    return HEADINGS.get(name) or (versions[0] if versions else name)


def _cell(row: dict | None) -> str:
    if row is None:
        return "–"
    if "after_seconds" in row:
        return f"stopped after {row['after_seconds']:g} s"
    ms, memory = format_ms(row["seconds"]["median"]), row["peak_memory_beyond_weights_bytes"]
    ms = f"**{ms}**" if row["contestant"] == "ours" else ms
    return ms if memory is None else f"{ms} · {memory / 1e9:.2f}"


def _of_ceiling(row: dict | None) -> str:
    if row is None or "seconds" not in row:
        return "–"
    return f"{row['floor_seconds'] / row['seconds']['median'] * 100:.0f} %"


def _lines(found: dict) -> list[dict]:
    """The whole layer's, those of stopped contestants too."""
    return [row for row in (*found["rows"], *found.get("stopped", ())) if row["part"] == "layer"]


def _text(lines: list[list[str]]) -> str:
    """A table of which the second line has the rules."""
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], text[1].replace(" ", ""), *text[2:]])


def table(results: list[dict]) -> str:
    """A line for each shape, token count, rank and routing; median ms and GB beyond the weights."""
    rows = [row for found in results for row in _lines(found)]
    cells = {(_key(row), row["contestant"]): row for row in rows}
    keys = list(dict.fromkeys(map(_key, rows)))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    # Shape and routing only where they tell lines apart; numbers to the right.
    shown = [i for i in range(4) if i in (1, 2) or len({key[i] for key in keys}) > 1]
    columns = [(("shape", "tokens", "rank", "routing")[i], "---:" if i in (1, 2) else "---") for i in shown]
    for name in names:
        columns.append((_heading(name, results), "---:"))
        if name == "ours":
            columns.append(("of the ceiling", "---:"))
    lines = [[heading for heading, _ in columns], [rule for _, rule in columns]]
    for key in keys:
        line = [str(key[i]) for i in shown]
        for name in names:
            row = cells.get((key, name))
            line += [_cell(row), _of_ceiling(row)] if name == "ours" else [_cell(row)]
        lines.append(line)
    return _text(lines)


def table_of_formats(found: dict) -> str:
    """A line for each kind of weights: median ms, and how much faster than dense at each token count."""
    rows = {(row["contestant"], row["tokens"]): row for row in _lines(found) if "seconds" in row}
    names, counts = (list(dict.fromkeys(key[i] for key in rows)) for i in (0, 1))
    (shape,) = found["shapes"].values()
    weights = 3 * shape["experts"] * shape["hidden"] * shape["inner"]
    errors = {
        check["contestant"]: check["relative_errors_to_original_weights"]
        for check in reversed(found["checks"])
    }
    lines = [["weights", "bits a weight", "error of y", *(f"{count} tokens" for count in counts)]]
    lines.append(["---", *["---:"] * (2 + len(counts))])
    for name in names:
        bits = next(row["weight_bytes"] for (mine, _), row in rows.items() if mine == name) * 8 / weights
        error = f"{errors[name]['y']:.1%}" if errors.get(name) else ""
        times = [_beside_dense(rows.get((name, count)), rows[DENSE, count]) for count in counts]
        lines.append([_of_weights(name, found), f"{bits:.3g}", error, *times])
    return _text(lines)


def _of_weights(name: str, found: dict) -> str:
    """What a contestant at `table_of_formats` runs on; whose it is, if not ours."""
    if name == DENSE:
        return f"dense {found['options']['dtype']}"
    who, _, format = name.rpartition("-") if name.startswith("kt-kernel") else name.partition("-")
    if who == DENSE:
        return format
    if who != "bitsandbytes":
        return f"{format}, {found['versions'][name]}"
    suffix = next(suffix for suffix in COPIES if format.endswith(suffix))
    return f"{format.removesuffix(suffix)}, {found['versions'][name]} {COPIES[suffix]}"


def _beside_dense(row: dict | None, dense: dict) -> str:
    if row is None:
        return "–"
    ms = format_ms(row["seconds"]["median"])
    return ms if row is dense else f"{ms} ({dense['seconds']['median'] / row['seconds']['median']:.2f}×)"


def _between(values: list[float], unit: str) -> str:
    low, high = (f"{value / 1e9:.0f}" for value in (min(values), max(values)))
    return f"{high} {unit}" if low == high else f"{low} to {high} {unit}"


def note(results: list[dict]) -> str:
    """Machine, instruction set, ceilings and, where known, the commands."""
    first = results[0]
    rows = [row for found in results for row in _lines(found) if "seconds" in row]
    ceilings = {
        "rate": _between([row["ceiling_flops_per_second"] for row in rows], "GF/s"),
        "bandwidth": _between([row["ceiling_bytes_per_second"] for row in rows], "GB/s"),
    }
    how = ", ".join(f"{value} ({first['ceilings'][f'{name}_by']})" for name, value in ceilings.items())
    text = (
        f"{first['machine']}, {first['options']['dtype']} on `{first['instruction_set']}`. Ceilings: {how}."
    )
    reasons = dict.fromkeys(note["reason"] for found in results for note in found.get("replaced", ()))
    text += "".join(f" Others in fp32, because {reason}." for reason in reasons)
    commands = [f"    {found['command']}" for found in results if "command" in found]
    return "\n".join([text, "", *commands] if commands else [text])


def render(files: list[str]) -> str:
    """files: relative to the repository, or absolute, with `--formats` before one of packed weights.
    ValueError unless all are one machine's. With `--whole` before those of whole models, of any machines.
    """
    if files[0] == WHOLE:
        found = [path for pattern in files[1:] for path in sorted(ROOT.glob(pattern))]
        if not found:
            raise ValueError(f"no file matches {', '.join(files[1:])}")
        made = _text(whole_models.table([json.loads(path.read_text()) for path in found]))
        return f"<!-- python -m benchmarks.markdown {' '.join(files)} -->\n{made}\n<!-- end -->"
    packed = files[0] == FORMATS
    results = [json.loads((ROOT / file).read_text()) for file in files[packed:]]
    if packed and len(results) != 1:
        raise ValueError(f"{FORMATS} takes one file, got {len(results)}")
    told = {(found["machine"], found["instruction_set"], found["options"]["dtype"]) for found in results}
    if len(told) > 1:
        raise ValueError(f"files must be of one machine, instruction set and dtype, got {sorted(told)}")
    named = " ".join(files)
    made = table_of_formats(results[0]) if packed else table(results)
    return f"<!-- python -m benchmarks.markdown {named} -->\n{made}\n\n{note(results)}\n<!-- end -->"


def update(text: str) -> str:
    """The text with every block rendered anew."""
    return BLOCK.sub(lambda block: render(block.group(1).split()), text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.markdown", description=__doc__.split("\n")[0].split(": ")[1]
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="results of one machine, dtype and set")
    parser.add_argument(FORMATS, action="store_true", help="a table of packed weights, of one file")
    parser.add_argument(WHOLE, action="store_true", help="a table of whole models")
    parser.add_argument("--update", type=Path, metavar="DOCUMENT", help="render its blocks anew instead")
    options = parser.parse_args(argv)
    if bool(options.files) == bool(options.update):
        parser.error("either result files or --update DOCUMENT")
    try:
        if options.update:
            options.update.write_text(update(options.update.read_text()))
        else:
            kind = [FORMATS] * options.formats + [WHOLE] * options.whole
            print(render([*kind, *options.files]))
    except (OSError, ValueError, KeyError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
