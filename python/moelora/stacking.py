"""Which tensors of a checkpoint make which experts' weight, by transformers' own map of names.

Files with a matrix for each expert are stacked as the dense ones are, expert by expert and projection by
projection, codes and scales alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from moelora.errors import MoeloraError
from moelora.experts import is_experts, outside, projections
from moelora.layouts import OURS, Files, Layout, Source, sources
from moelora.matrices import OTHER_WAY, checked
from torch_moelora.formats import E4M3, FORMATS, MIDDLE, NESTED_RUN, PackedWeight


@dataclass
class Stack:
    """One experts' weight: [expert][projection, in the order of rows]. A stacked one is the single entry."""

    module: str
    weight: str
    size: tuple[int, ...]  # [E, N, K], nn.Linear's orientation
    sources: list[list[Source]] = field(default_factory=list)
    stacked: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.weight}"

    def check(self, weight: PackedWeight) -> PackedWeight:
        """The weight. Raises: MoeloraError if it is not of the size that the model has."""
        if tuple(weight.shape) != self.size:
            raise MoeloraError(
                f"{self.name} is packed {_size(weight.shape)} in the file, expected {_size(self.size)}"
            )
        return weight


@dataclass
class Plan:
    """What of a checkpoint is packed. linears: by the name of the parameter in the model."""

    stacks: list[Stack]
    linears: dict[str, Source]


def plan(model: nn.Module, files: Files, layout: Layout, key_mapping: dict[str, str] | None = None) -> Plan:
    """Assigns a checkpoint's packed weights to the parameters of a model on the meta device.

    key_mapping: transformers' argument.

    Raises: MoeloraError for an experts' weight that is incomplete, or built as codes cannot be.
    """
    stacks = expert_stacks(model)
    state = model.state_dict()
    names = Names(model, state, key_mapping)
    linears: dict[str, Source] = {}
    packed = sources(files, layout)
    found: dict[str, dict[tuple[int, int], Source]] = {}
    for source in packed:
        target, converter, at = names.of(source.name)
        if layout.stacked and source.name in stacks:  # named as in memory, whatever the map says
            target, converter = source.name, None
        if layout is OURS:  # which says by the model's names what is packed how
            source = Source(target, source.tensors)
        if target in stacks and layout.stacked and converter is None:
            stacks[target].sources, stacks[target].stacked = [[source]], True
        elif target in stacks:
            place = (_number(source.name), order(target, converter, at, source))
            found.setdefault(target, {})[place] = source
        elif target in state:
            if converter is not None:
                raise MoeloraError(f"{source.name} is packed, and {target} is built of several: {OTHER_WAY}")
            linears[target] = source
    for target, places in found.items():
        stacks[target].sources = complete(stacks[target], places)
    taken = {tensor for source in packed for tensor in source.tensors.values()}
    dense = {names.of(tensor)[0] for tensor in files.names if tensor not in taken}
    for stack in stacks.values():
        if not stack.sources and stack.name not in dense:
            raise MoeloraError(
                f"{stack.name} is not in the files: expected it packed ({layout.name}) or dense"
            )
    return Plan([stack for stack in stacks.values() if stack.sources], linears)


def expert_stacks(model: nn.Module) -> dict[str, Stack]:
    """The weights of all experts, by their names."""
    stacks = {}
    for where, module in model.named_modules():
        if is_experts(module):
            for weight in projections(module):
                size = tuple(getattr(module, weight).shape)
                size = (size[0], size[2], size[1]) if module.is_transposed else size
                stacks[f"{where}.{weight}"] = Stack(where, weight, size)
    if not stacks:
        kind = type(model).__name__
        raise MoeloraError(
            f"{kind} has no expert layers that follow transformers' experts interface, so nothing can stay "
            f"packed{outside(model)}"
        )
    return stacks


class Names:
    """transformers' map from a checkpoint's names to those of a model's parameters."""

    def __init__(
        self, model: nn.Module, state: dict[str, Tensor], key_mapping: dict[str, str] | None = None
    ) -> None:
        mapping = get_model_conversion_mapping(model, key_mapping)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {p: entry for entry in self._converters for p in entry.source_patterns}
        self._prefix, self._state = model.base_model_prefix, state

    def of(self, name: str) -> tuple[str, WeightConverter | None, int]:
        """(parameter, what builds it, which of its sources this is)."""
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        if target not in self._state and name in self._state:
            return name, None, 0
        converter = self._by_pattern.get(pattern)
        return target, converter, converter.source_patterns.index(pattern) if converter else 0


def order(target: str, converter: WeightConverter | None, at: int, source: Source) -> int:
    """Which block of rows a matrix is. What is stacked and then put one below the other can stay packed."""
    if converter is None:
        raise MoeloraError(
            f"{source.name} is packed and stacked, which this layout has expert by expert: {OTHER_WAY}"
        )
    several = len(converter.source_patterns) > 1
    first, *rest = converter.operations
    joined = [op for op in rest if isinstance(op, Concatenate) and op.dim == 1]
    if not isinstance(first, MergeModulelist) or first.dim != 0 or len(rest) != several or joined != rest:
        steps = ", ".join(map(repr, converter.operations))
        raise MoeloraError(f"{target} is built by {steps}, which packed weights cannot follow: {OTHER_WAY}")
    return at


def _number(name: str) -> int:
    """The expert: the last number among the parts of a name."""
    return int(next(part for part in reversed(name.split(".")) if part.isdecimal()))


def complete(stack: Stack, places: dict[tuple[int, int], Source]) -> list[list[Source]]:
    experts = stack.size[0]
    several = max(order for _, order in places) + 1
    example = next(iter(places.values())).name
    for expert, order in places:
        if expert >= experts:
            raise MoeloraError(
                f"{places[expert, order].name} is of expert {expert}, expected 0 to {experts - 1} of "
                f"{stack.name}"
            )
    for expert in range(experts):
        for order in range(several):
            if (expert, order) not in places:
                raise MoeloraError(
                    f"{stack.name} lacks block {order} of expert {expert}: expected {experts} experts with "
                    f"{several} matrices each, such as {example}, found {len(places)}"
                )
    return [[places[expert, order] for order in range(several)] for expert in range(experts)]


def matrix(stack: Stack, expert: int, files: Files, layout: Layout, settings: dict) -> PackedWeight:
    """The weight of one expert, [1, N, K]; of a stacked file all, as they lie there."""
    parts = [layout.matrix(source.name, source.parts(files), settings) for source in stack.sources[expert]]
    if stack.stacked:
        return stack.check(parts[0])
    try:
        joined = below(parts)
    except ValueError as error:
        raise MoeloraError(f"{stack.name}, expert {expert}: {error}") from None
    if tuple(joined.shape[1:]) != stack.size[1:]:
        sizes = " and ".join(_size(part.shape[1:]) for part in parts)
        name = stack.sources[expert][0].name
        raise MoeloraError(f"{name}: packed {sizes}, expected together {_size(stack.size[1:])}")
    return checked(stack.name, joined)


def below(parts: list[PackedWeight]) -> PackedWeight:
    """Matrices [1, N, K] one below the other, as one with the sum of their rows.

    Raises: ValueError, if they differ in more than what a format can say of rows.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        if part.format != first.format or part.shape[2] != first.shape[2]:
            found = " and ".join(f"{part.format} {_size(part.shape[1:])}" for part in parts)
            raise ValueError(f"its matrices are {found}, expected one format and width")
    if first.format == "fp8":
        parts = _same_grid(parts)
    if not all(part.is_nested and part.scale.numel() % NESTED_RUN == 0 for part in parts):
        parts = [part.unnested("load") if part.is_nested else part for part in parts]
    if any(part.zero is not None for part in parts):
        parts = [part._replace(zero=_zero(part)) for part in parts]
    shapes = {(part.scale.dtype, part.scale.shape[2]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"its matrices have scales {[(str(p.scale.dtype), list(p.scale.shape)) for p in parts]}"
        )
    if FORMATS[first.format].scale2 == "parts" and len({part.shape[1] for part in parts}) > 1:
        raise ValueError("its matrices have global scales of their own, and not the same height")
    # A run of nested scales is a row of scale2, a part of an expert's rows a column.
    along = 0 if parts[0].is_nested else 1
    columns = zip(*(part[:4] for part in parts), strict=True)
    codes, scale, scale2, zero = (
        _joined(tensors, along if at == 2 else 1) for at, tensors in enumerate(columns)
    )
    return PackedWeight(codes, scale, scale2, zero, first.format)


def _same_grid(parts: list[PackedWeight]) -> list[PackedWeight]:
    """Blocks of rows stay if every matrix is whole blocks; else each row gets its scale."""
    block = FORMATS["fp8"].groups.least
    dtype = torch.float32 if len({part.scale.dtype for part in parts}) > 1 else parts[0].scale.dtype
    whole = all(
        part.shape[1] % block == 0 and part.scale.shape[1] == part.shape[1] // block for part in parts[:-1]
    ) and parts[-1].scale.shape[1] == -(-parts[-1].shape[1] // block)
    out = []
    for part in parts:
        scale, rows = part.scale.to(dtype), part.shape[1]
        if not whole and scale.shape[1] != rows:
            each = rows if scale.shape[1] == 1 else block
            scale = scale.repeat_interleave(each, 1)[:, :rows]
        out.append(part._replace(scale=scale))
    if len({part.scale.shape[2] for part in out}) > 1:  # a scale a row beside blocks
        widest = max(part.scale.shape[2] for part in out)
        out = [part._replace(scale=part.scale.expand(-1, -1, widest)) for part in out]
    return out


def _zero(part: PackedWeight) -> Tensor:
    return torch.full(part.scale.shape, MIDDLE, dtype=torch.uint8) if part.zero is None else part.zero


def _joined(tensors: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    if tensors[0] is None:
        return None
    if tensors[0].dtype == E4M3:  # by its bytes, which every backend can copy
        return torch.cat([t.view(torch.uint8) for t in tensors], dim).view(E4M3)
    return torch.cat(tensors, dim)


def _size(shape) -> str:
    return "×".join(map(str, shape))
