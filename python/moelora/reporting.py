"""What `moelora.enable` did, layer by layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class AdapterReport:
    """One adapter on one expert parameter."""

    parameter: str
    adapter: str
    rank: int
    path: str  # "operators" or "PEFT"
    reason: str  # why PEFT, or ""
    active: bool
    trainable: bool
    gradient: bool | None  # one other than zero has reached it since it was enabled; None: cannot be told
    zero: bool = False  # B is zero, so it changes nothing: it is new, or nothing was loaded into it

    @property
    def untrained(self) -> bool:
        """Active and meant to learn, but no gradient has come so far."""
        return self.active and self.trainable and self.gradient is False

    @property
    def unknown(self) -> bool:
        """Active and meant to learn, but whether a gradient has come cannot be told."""
        return self.active and self.trainable and self.gradient is None

    def __str__(self) -> str:
        notes = [] if self.path == "operators" else [f"by PEFT: {self.reason}"]
        notes += [] if self.active else ["inactive"]
        notes += [] if self.trainable else ["frozen"]
        notes += ["B is zero: changes nothing yet"] if self.zero else []
        notes += ["no gradient yet"] if self.untrained else []
        notes += ["gradient unknown"] if self.unknown else []
        return f"{self.parameter} r={self.rank}" + (f" ({'; '.join(notes)})" if notes else "")


@dataclass(frozen=True)
class LayerReport:
    """One expert layer."""

    name: str
    kind: str  # the module's class
    path: str  # "operators" or "transformers"
    reason: str  # why transformers, or ""
    experts: int
    projections: tuple[str, str]  # the names of its weights
    gate: str  # "fused" or "module": who computes what is between the projections
    weights: str  # "frozen" or "trainable": the experts' own
    format: str  # of the weights: "dense", or a name of torch_moelora.formats
    nbytes: int  # of the weights, scales included
    adapters: tuple[AdapterReport, ...]
    places: tuple[str, ...] = ()  # of a placed layer: which of its experts are where


@dataclass(frozen=True)
class Report:
    """Which expert layers run on the operators, which do not and why, and which LoRA parameters they carry.

    Prints as a table in which layers that differ only in their number share a row.
    """

    layers: tuple[LayerReport, ...] = field(default=())
    notes: tuple[str, ...] = ()  # what an adapter's configuration asks for in vain, and what would do it
    linears: int = 0  # frozen linear layers that run on the operators

    @property
    def served(self) -> tuple[LayerReport, ...]:
        """The layers that use the operators."""
        return tuple(layer for layer in self.layers if layer.path == "operators")

    @property
    def trainable(self) -> int:
        """How many LoRA parameters on experts are active and trainable."""
        return sum(a.active and a.trainable for layer in self.layers for a in layer.adapters)

    @property
    def untrained(self) -> tuple[str, ...]:
        """The adapted parameters that are active and trainable but have seen no gradient so far."""
        return tuple(
            f"{layer.name}.{a.parameter}" for layer in self.layers for a in layer.adapters if a.untrained
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        table = Table(box=None, pad_edge=False, header_style="")
        for heading in ("expert layers", "class", "experts", "computed by", "LoRA"):
            table.add_column(heading, justify="right" if heading == "experts" else "left")
        for names, layer in _rows(self.layers):
            path = layer.path if not layer.reason else f"{layer.path}: {layer.reason}"
            path += " (own gate)" if layer.path == "operators" and layer.gate == "module" else ""
            kind = layer.kind
            if layer.format != "dense":
                kind += f", {layer.format}, {_bytes(layer.nbytes)}"
            adapters = ", ".join(map(str, layer.adapters)) or "none"
            table.add_row(names, kind, ", ".join((str(layer.experts), *layer.places)), path, adapters)
        console = Console(file=StringIO(), width=200, color_system=None)
        console.print(table)
        console.print(*self._summary(), sep="\n", markup=False, highlight=False, soft_wrap=True)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def _summary(self) -> Iterator[str]:
        """What a run that trains nothing would look like, in words."""
        adapted = sum(a.active for layer in self.layers for a in layer.adapters)
        own = any(layer.weights == "trainable" for layer in self.layers)
        nothing = "NOTHING ON THE EXPERTS WILL BE TRAINED"
        if self.trainable:
            unknown = sum(a.unknown for layer in self.layers for a in layer.adapters)
            seen = self.trainable - len(self.untrained) - unknown
            told = f"{self.trainable} expert parameters train with LoRA, gradients have reached {seen} so far"
            yield told + (f"; of {unknown} it cannot be told" if unknown else "")
        elif adapted:
            yield f"{nothing}: their LoRA is frozen (load it with is_trainable=True)"
        elif not own:
            names = sorted({f'"experts.{name}"' for layer in self.layers for name in layer.projections})
            yield f"{nothing}: no LoRA is active on them (target_parameters=[{', '.join(names)}])"
        if self.linears:
            yield f"{self.linears} frozen linear layers run on the operators too"
        active = [a for layer in self.layers for a in layer.adapters if a.active]
        if active and all(a.zero and not a.trainable for a in active):
            yield (
                "THE LORA ON THE EXPERTS CHANGES NOTHING: every B is zero, as if nothing had been loaded "
                "(moelora.check_adapter(model, directory) compares it with its file)"
            )
        yield from self.notes


def _bytes(count: int) -> str:
    """In the largest unit of which there is one."""
    unit, size = next(
        (u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if count >= s or s == 1
    )
    return f"{count / size:.3g} {unit}"


def _rows(layers: tuple[LayerReport, ...]) -> Iterator[tuple[str, LayerReport]]:
    """(names, example) of the layers that differ only in one number of their name."""
    groups: dict[tuple, list[LayerReport]] = {}
    for layer in layers:
        same = (re.sub(r"\d+", "*", layer.name), *(v for k, v in vars(layer).items() if k != "name"))
        groups.setdefault(same, []).append(layer)
    for (pattern, *_), group in groups.items():
        yield (f"{pattern}  ×{len(group)}" if len(group) > 1 else group[0].name), group[0]
