"""`python -m moelora merge`: base and adapter in one checkpoint, and how much of the adapter is in it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from moelora import adapter_deltas, checkpoint_writer, model_names
from moelora.adapter_deltas import Delta
from moelora.checkpoint_reader import PackedSource, Source
from moelora.checkpoint_writer import Item, Written
from moelora.commands import choices, rewriting
from moelora.commands.quantize import kept
from moelora.errors import MoeloraError
from moelora.packed_layout import Choice, Layout
from moelora.packing import Cast, Copied, Dense, Packed
from moelora.shards import Stored

SAME = "same"
LITTLE = 0.8  # of the adapter: less in packed weights is worth an advice
LOUD = 1.0  # the rounding's error beside the adapter's change


class Target(NamedTuple):
    """layout: of what is to be packed, None for nothing. dtype: of all that is dense, None for its own."""

    layout: Layout | None
    dtype: torch.dtype | None

    def choice(self, source: Source, name: str) -> Choice | None:
        """How a weight is packed; None for dense."""
        if self.layout is None or not (name in source.experts or name in source.linears):
            return None
        return self.layout.choice(name, name in source.experts)


def main(explicit: dict[str, Any]) -> None:
    """Writes the checkpoint and prints the table. MoeloraError tells the user what to mend."""
    started = time.perf_counter()
    out, adapter = Path(explicit["out"]), Path(explicit["adapter"])
    checkpoint_writer.check_free(out)
    workers = choices.workers(explicit)
    wanted = None if explicit["format"] == SAME else choices.layout(explicit)
    adapter_deltas.check(adapter)
    source = Source(Path(explicit["model_dir"]))
    rewriting.check_beside(source)
    target = _target(explicit, source, wanted)
    deltas = adapter_deltas.deltas(adapter, model_names.outline(source.plain))
    for name in deltas:
        if not source.matrix(name):
            raise MoeloraError(
                f"the adapter in {adapter} adapts {name}, which is no matrix of its own in {source.directory}"
            )
    _check_copies(adapter, source)
    changed = _changed(source, target, deltas)
    packs = {name: target.choice(source, name) for name in changed if target.choice(source, name)}
    choices.check_shapes({n: (choice, *source.weights[n].shape[1:]) for n, choice in packs.items()})
    items = rewriting.items(source, changed, lambda disk, tensor: _other(source, target, disk, tensor))
    files = [adapter / "adapter_config.json", adapter / adapter_deltas.FILE]
    about = {
        "base": source.fingerprint(),
        "adapter": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files],
        "format": [target.layout and target.layout.section(), str(target.dtype)],
        "command": "merge",
    }

    def beside(directory: Path, written: Written) -> None:
        dtype = None if target.dtype is None else str(target.dtype).removeprefix("torch.")
        rewriting.write_config(source, target.layout, dtype, directory)

    written = checkpoint_writer.write(out, items, about, beside, workers, "merge")
    rows = [row for row in written.told if row and row["name"] in deltas]
    print(table(source, target, rows))
    print(choices.finished(out, written, time.perf_counter() - started))
    print(verdict(target, rows))


def _check_copies(adapter: Path, source: Source) -> None:
    """The adapter may have the base's own weights with it, but no others."""
    for name, copied in adapter_deltas.copies(adapter).items():
        own = source.find(name)
        if own is None or own.spec.shape != copied.spec.shape or not _equal(own.read(), copied.read()):
            raise MoeloraError(
                f"the adapter in {adapter} has a {name} of its own, other than that of {source.directory}, "
                "which cannot be merged"
            )


def _equal(own: torch.Tensor, copied: torch.Tensor) -> bool:
    return torch.equal(own.to(copied.dtype), copied) or torch.equal(own, copied.to(own.dtype))


def _target(explicit: dict[str, Any], source: Source, wanted: Layout | None) -> Target:
    if explicit["format"] == SAME:
        for flag in ("nested", "group_size", "linears"):
            if explicit.get(flag) not in (None, False):
                raise MoeloraError(f"--{flag.replace('_', '-')} needs a --format, got {SAME}")
        return Target(source.layout, None)
    if wanted is not None:
        return Target(kept(source, wanted), None)
    return Target(None, getattr(torch, choices.DENSE[explicit["format"]]))


def _changed(source: Source, target: Target, deltas: dict[str, Delta]) -> dict[str, Item]:
    """The weights that are not written as they are."""
    found: dict[str, Item] = {}
    for name, weight in source.weights.items():
        delta, choice = deltas.get(name), target.choice(source, name)
        if choice is not None:
            if delta is not None or getattr(weight, "choice", None) != choice:
                found[name] = Packed(weight, choice, delta)
            continue
        dtype = target.dtype or weight.dtype
        if delta is not None or isinstance(weight, PackedSource) or dtype != weight.dtype:
            found[name] = Dense(weight, dtype, source.names, delta)
    return found


def _other(source: Source, target: Target, disk: str, tensor: Stored) -> Item:
    """As it is, or in the new dtype if it is in that of most: some are in another for a reason."""
    own = source.main_dtype
    if target.dtype in (None, own) or tensor.spec.dtype != own:
        return Copied(disk, tensor)
    return Cast(disk, tensor, target.dtype)


def table(source: Source, target: Target, rows: list[dict[str, Any]]) -> str:
    """How much of the adapter is in each kind of weight."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    shown = Table(box=None, pad_edge=False, header_style="")
    for heading in ("weights", "tensors", "written as", "kept of the adapter", "least", "rounding / adapter"):
        shown.add_column(heading, justify="left" if heading in ("weights", "written as") else "right")
    for kind, same in kinds.items():
        written = {
            str(target.choice(source, row["name"]) or target.dtype or source.weights[row["name"]].dtype)
            for row in same
        }
        whole = total(same)
        shown.add_row(
            *(kind, str(len(same)), " or ".join(sorted(written)).replace("torch.", "")),
            *(percent(share(whole)), percent(min(map(share, same))), f"{noise(whole):.2g}"),
        )
    return rewriting.rendered(shown)


def total(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of several weights together."""
    return {figure: sum(row[figure] for row in rows) for figure in ("error", "norm", "kept", "delta")}


def share(row: dict[str, Any]) -> float:
    """⟨written - base, delta⟩ / ⟨delta, delta⟩; 1 where there is no delta to lose."""
    return row["kept"] / row["delta"] if row["delta"] else 1.0


def noise(row: dict[str, Any]) -> float:
    """‖written - wanted‖ / ‖delta‖."""
    return math.sqrt(row["error"] / row["delta"]) if row["delta"] else 0.0


def percent(value: float) -> str:
    return f"{value:.1%}"


def verdict(target: Target, rows: list[dict[str, Any]]) -> str:
    """A line on the whole, and what to do where little is left."""
    whole = total(rows)
    if not whole["delta"]:
        return "the adapter changes nothing: every B is zero"
    told = f"{percent(share(whole))} of the adapter's change is in the merged weights"
    if target.layout is None or (share(whole) >= LITTLE and noise(whole) <= LOUD):
        return told
    return (
        f"{told}, beside a rounding error of {noise(whole):.2g} times its size. --format bfloat16 keeps it, "
        "and so does the packed base with the adapter beside it, unmerged"
    )
