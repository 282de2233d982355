"""The layout of our own packed checkpoints: names of tensors, and the section of config.json.

A packed checkpoint is a transformers directory whose safetensors hold, where the model has the weight
`NAME`, the tensors of a `PackedWeight` as `NAME.codes`, `NAME.scale` and, where the format has them,
`NAME.scale2` and `NAME.zero`. All are those of [E, N, K], nn.Linear's orientation, never transposed:

- experts, by the parameter of transformers' module in memory: `model.layers.0.mlp.experts.gate_up_proj`,
  rows in the module's order (gate then up, or interleaved), all experts of a layer in one weight;
- linear layers, where they are packed too: `model.layers.0.self_attn.q_proj.weight`, with E = 1.

Every other tensor is as in the dense checkpoint. config.json has

    "quantization_config": {"quant_method": "moelora", "version": 1, "linears": null,
                            "experts": {"format": "nf4", "group_size": 64, "nested": true}}

where group_size is `torch_moelora.formats.quantize`'s, 0 for the whole row (of fp8: for whatever grid its
scales have), and `linears` null or such a choice. A checkpoint with weights that are packed otherwise has
version 2 and their choices, by name, under `others`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from moelora.errors import MoeloraError
from torch_moelora.formats import FORMATS, NESTED_RUN, PackedWeight

SECTION = "quantization_config"
METHOD = "moelora"
VERSION, MIXED = 1, 2  # the second of checkpoints with `others`, which a reader must know of
PARTS = ("codes", "scale", "scale2", "zero")  # suffixes, the fields of PackedWeight


@dataclass(frozen=True)
class Choice:
    """How weights of a kind are packed: `torch_moelora.formats.quantize`'s arguments."""

    format: str
    group_size: int
    nested: bool = False

    @classmethod
    def of(cls, format: str, group_size: int | None = None, nested: bool = False) -> Choice:
        """With the format's own group size where none is given.

        Raises: MoeloraError for what is no format, or a group size or nesting that it does not have.
        """
        if format not in FORMATS or FORMATS[format].bits is None:
            raise MoeloraError(f"the format is {format!r}, expected one of {', '.join(formats())}")
        row = FORMATS[format]
        if nested and not row.nested:
            which = ", ".join(name for name in formats() if FORMATS[name].nested)
            raise MoeloraError(f"nested scales are for {which}, got {format}")
        groups = row.groups
        size = groups.default if group_size is None else group_size
        possible = size in (0, groups.least) if groups.kind == "grid" else groups.allow(size, size)
        if not possible and not (size == 0 and groups.kind == "multiple"):
            raise MoeloraError(f"the group size is {size}, which {format} does not have")
        return cls(format, size, nested)

    def misfit(self, n: int, k: int) -> str | None:
        """Why a weight [E, n, k] cannot be packed so, or None."""
        row = FORMATS[self.format]
        if k % row.per_byte:
            return f"K is {k}, expected an even one"
        if row.groups.kind == "grid" or row.groups.allow(self.group_size or k, k):
            return None
        sizes = [g for g in (256, 128, 64, 32, 16) if row.groups.allow(g, k)]
        instead = f" (groups of {' or '.join(map(str, sizes))} would fit)" if sizes else ""
        return f"K is {k}, which {self} do not fit{instead}"

    def __str__(self) -> str:
        size = f"groups of {self.group_size}" if self.group_size else "a scale a row"
        return f"{self.format}, {size}{', nested' if self.nested else ''}"


@dataclass(frozen=True)
class Layout:
    """What of a checkpoint is packed, and how.

    experts, linears: most of them. others: what is packed otherwise, by the weight's name.
    """

    experts: Choice | None
    linears: Choice | None = None
    others: Mapping[str, Choice] = field(default_factory=dict)

    def choice(self, name: str, expert: bool) -> Choice | None:
        """How the weight of a name is packed; None for dense."""
        return self.others.get(name, self.experts if expert else self.linears)

    def __str__(self) -> str:
        kinds = {"experts": self.experts, "linear layers": self.linears}
        told = [f"{what} {one}" for what, one in kinds.items() if one is not None]
        told += [f"{many} weights {one}" for one, many in Counter(self.others.values()).items()]
        return "; ".join(told)

    def section(self) -> dict[str, Any]:
        """The value of "quantization_config"."""
        experts, linears = (one and asdict(one) for one in (self.experts, self.linears))
        others = {"others": {name: asdict(one) for name, one in self.others.items()}} if self.others else {}
        return {
            "quant_method": METHOD,
            "version": MIXED if others else VERSION,
            "experts": experts,
            "linears": linears,
            **others,
        }


def formats() -> list[str]:
    """The names of the formats that pack."""
    return [row.name for row in FORMATS.values() if row.bits is not None]


def is_ours(section: Any) -> bool:
    """Whether a "quantization_config" is this layout's."""
    return isinstance(section, dict) and section.get("quant_method") == METHOD


def read(section: dict[str, Any]) -> Layout:
    """The layout that a "quantization_config" of ours describes.

    Raises: MoeloraError that names the field that is missing or of another kind than expected.
    """
    version = section.get("version")
    if version not in (VERSION, MIXED):
        raise MoeloraError(f'"version" of {SECTION} is {version!r}, expected {VERSION} or {MIXED}')
    linears, others = section.get("linears"), section.get("others") or {}
    if not isinstance(others, dict):
        raise MoeloraError(f'"others" of {SECTION} is {others!r}, expected formats by names of weights')
    experts = section.get("experts")
    return Layout(
        None if experts is None and linears is not None else _choice("experts", experts),
        None if linears is None else _choice("linears", linears),
        {name: _choice(f"others.{name}", value) for name, value in others.items()},
    )


def _choice(field: str, value: Any) -> Choice:
    where = f'"{field}" of {SECTION}'
    if not isinstance(value, dict):
        raise MoeloraError(f"{where} is {value!r}, expected a format with its group_size and nested")
    name, size, nested = value.get("format"), value.get("group_size"), value.get("nested", False)
    if name not in FORMATS or FORMATS[name].bits is None:
        raise MoeloraError(f"{where} has the format {name!r}, expected one of {', '.join(formats())}")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise MoeloraError(f"{where} has the group_size {size!r}, expected a whole number, 0 for the row")
    if not isinstance(nested, bool) or (nested and not FORMATS[name].nested):
        raise MoeloraError(f"{where} has nested {nested!r}, expected false for {name}")
    return Choice(name, size, nested)


def split(tensor: str) -> tuple[str, str] | None:
    """`NAME.scale` → (`NAME`, `scale`); None for what is no part of a packed weight."""
    name, dot, part = tensor.rpartition(".")
    return (name, part) if dot and part in PARTS else None


def tensors(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The tensors to store for the packed weight `name`."""
    return {f"{name}.{part}": t for part, t in zip(PARTS, weight[:4], strict=True) if t is not None}


def packed(choice: Choice, parts: dict[str, Tensor]) -> PackedWeight:
    """The weight of the stored tensors, given by their suffixes; what it holds is not checked."""
    return PackedWeight(*(parts.get(part) for part in PARTS), format=choice.format)


def specs(
    choice: Choice, shape: tuple[int, int, int], parts: int = 1, zeros: bool = False
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix → (dtype, shape) of what `torch_moelora.formats.quantize` makes of a weight [E, N, K].

    parts: P, how many multipliers an expert has where the format has them. zeros: with zero points.
    """
    experts, n, k = shape
    row = FORMATS[choice.format]
    group = choice.group_size or k
    scale = (experts, n, k // group)
    if row.groups.kind == "grid" and choice.group_size:
        scale = (experts, -(-n // group), -(-k // group))
    dtype = torch.uint8 if choice.nested else row.scale_dtypes[0]
    found = {"codes": (row.storage, (experts, n, k // row.per_byte)), "scale": (dtype, scale)}
    if choice.nested:
        found["scale2"] = (torch.float32, (-(-experts * n * (k // group) // NESTED_RUN), 2))
    elif row.scale2 == "parts":
        found["scale2"] = (torch.float32, (experts, parts))
    if zeros:
        found["zero"] = (torch.uint8, scale)
    return found
