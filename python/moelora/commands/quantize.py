"""`python -m moelora quantize`: a checkpoint with packed experts, and how far they are from the original."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from moelora import checkpoint_writer, packed_layout
from moelora.checkpoint_reader import ERRORS, PackedSource, Source, natural
from moelora.checkpoint_writer import Written
from moelora.commands import choices, rewriting
from moelora.errors import MoeloraError
from moelora.packed_layout import Choice, Layout
from moelora.packing import Packed


def main(explicit: dict[str, Any]) -> None:
    """Writes the checkpoint and prints the table. MoeloraError tells the user what to mend."""
    started = time.perf_counter()
    out = Path(explicit["out"])
    checkpoint_writer.check_free(out)
    if explicit["format"] in choices.DENSE:
        formats = ", ".join(packed_layout.formats())
        raise MoeloraError(f"--format is {explicit['format']}, expected one of {formats}")
    wanted = choices.layout(explicit)
    workers = choices.workers(explicit)
    source = Source(Path(explicit["model_dir"]))
    rewriting.check_beside(source)
    layout = kept(source, wanted)
    pack = to_pack(source, layout)
    choices.check_shapes({n: (choice, *source.weights[n].shape[1:]) for n, choice in pack.items()})
    _warn_of_errors_that_add(source, pack)
    packed = {name: Packed(source.weights[name], choice) for name, choice in pack.items()}
    made = rewriting.items(source, packed)
    about = {"source": source.fingerprint(), "layout": layout.section(), "command": "quantize"}

    def beside(directory: Path, written: Written) -> None:
        rewriting.write_config(source, layout, None, directory)
        figures = {row["name"]: relative(row) for row in filter(None, written.told)}
        text = json.dumps(dict(sorted(figures.items(), key=lambda pair: natural(pair[0]))), indent=1)
        (directory / ERRORS).write_text(text + "\n", encoding="utf-8")

    written = checkpoint_writer.write(out, made, about, beside, workers, "quantize")
    print(table(source, pack, [row for row in written.told if row]))
    print(choices.finished(out, written, time.perf_counter() - started))
    print(f"the relative error of each tensor is in {out / ERRORS}")


def kept(source: Source, wanted: Layout) -> Layout:
    """The layout, with linear layers as they are packed already if nothing else is asked for."""
    if wanted.linears is None and source.layout is not None:
        others = {n: one for n, one in source.layout.others.items() if n not in source.experts}
        return Layout(wanted.experts, source.layout.linears, others)
    return wanted


def to_pack(source: Source, layout: Layout) -> dict[str, Choice]:
    """The weights that are to be packed, or packed otherwise than they are."""
    found = {}
    for name, weight in source.weights.items():
        choice = layout.choice(name, name in source.experts)
        if choice is not None and getattr(weight, "choice", None) != choice:
            found[name] = choice
    return found


def _warn_of_errors_that_add(source: Source, pack: dict[str, Choice]) -> None:
    packed = [weight for weight in map(source.weights.get, pack) if isinstance(weight, PackedSource)]
    if packed:
        before = "; ".join(sorted({str(weight.choice) for weight in packed}))
        print(
            f"moelora: {source.directory} is packed already ({before}): the errors below are beside that, "
            "and add to those that it has",
            file=sys.stderr,
        )


def table(source: Source, pack: dict[str, Choice], rows: list[dict[str, Any]]) -> str:
    """The relative error, root of mean squares, of each kind of weight."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    shown = Table(box=None, pad_edge=False, header_style="")
    for heading in ("weights", "tensors", "packed", "bits a weight", "error", "worst", "of"):
        shown.add_column(heading, justify="left" if heading in ("weights", "packed", "of") else "right")
    for kind, same in kinds.items():
        error, norm = (sum(row[figure] for row in same) for figure in ("error", "norm"))
        worst = max(same, key=relative)
        choice, shape = pack[worst["name"]], source.weights[worst["name"]].shape
        shown.add_row(
            *(kind, str(len(same)), str(choice), f"{bits(choice, shape):.2f}"),
            *(f"{relative({'error': error, 'norm': norm}):.2%}", f"{relative(worst):.2%}", worst["name"]),
        )
    return rewriting.rendered(shown)


def relative(row: dict[str, Any]) -> float:
    """‖packed - original‖ / ‖original‖."""
    return math.sqrt(row["error"] / row["norm"]) if row["norm"] else 0.0


def bits(choice: Choice, shape: tuple[int, int, int]) -> float:
    """That a weight takes, scales included."""
    parts = packed_layout.specs(choice, shape).values()
    return 8 * sum(math.prod(size) * dtype.itemsize for dtype, size in parts) / math.prod(shape)
