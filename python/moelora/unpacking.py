"""Packed matrices outside of experts: which stay packed, and how transformers' loader dequantises others."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from moelora import quantizer
from moelora.errors import MoeloraError
from moelora.layouts import Files, Layout, Source
from moelora.packed_layout import Choice
from torch_moelora.formats import FORMATS, PackedWeight

# What was wrong with the tensors of linear layers, in this thread's load.
PROBLEMS: ContextVar[list[MoeloraError] | None] = ContextVar("problems", default=None)


class Dequantise(ConversionOps):
    """The tensors of one packed linear layer → its weight in the model's dtype. Dense ones pass."""

    def __init__(self, owner: quantizer.MoeloraQuantizer, layout: Layout, parts: dict[str, str]) -> None:
        self.hf_quantizer = owner  # so that transformers casts nothing on the way here
        self._layout, self._parts = layout, parts

    def __deepcopy__(self, memo: dict) -> Dequantise:
        return self  # transformers copies converters for each weight

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        parts = {self._parts[pattern]: tensors[0] for pattern, tensors in input_dict.items()}
        empty = model.get_parameter(full_layer_name)
        try:
            return {full_layer_name: self._weight(full_layer_name, parts, empty)}
        except MoeloraError as error:  # transformers keeps the place, and says less than this
            if (problems := PROBLEMS.get()) is not None:
                problems.append(error)
            raise

    def _weight(self, name: str, parts: dict[str, Tensor], empty: Tensor) -> Tensor:
        plain = self._layout.plain
        if parts.keys() == {plain} and parts[plain].dtype in (torch.float32, torch.bfloat16, torch.float16):
            return parts[plain].to(empty.dtype)
        weight = self._layout.matrix(name, parts, self.hf_quantizer.quantization_config.settings)
        _check_size(name, weight, empty)
        return weight.dequantize(empty.dtype)[0]


def linears(
    model: nn.Module, packed: dict[str, Source], files: Files, layout: Layout, settings: dict
) -> tuple[dict[str, tuple[nn.Module, str, PackedWeight]], dict[str, Source]]:
    """(linear layers that stay packed: module, parameter and weight of each; what is to be dequantised).

    A module of a class of its own, such as a router, computes with its weight itself.
    """
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    kept, others = {}, {}
    for name, source in packed.items():
        where, _, parameter = name.rpartition(".")
        module = model.get_submodule(where)
        if type(module) is not nn.Linear or parameter != "weight" or name in tied:
            others[name] = source
            continue
        weight = layout.matrix(source.name, source.parts(files), settings)
        _check_size(name, weight, module.weight)
        kept[name] = module, parameter, weight
    return kept, others


def _check_size(name: str, weight: PackedWeight, empty: Tensor) -> None:
    if tuple(weight.shape[1:]) != tuple(empty.shape):
        found, expected = ("×".join(map(str, shape)) for shape in (weight.shape[1:], empty.shape))
        raise MoeloraError(f"{name} is packed {found} in the file, expected {expected}")


def converters(
    owner: quantizer.MoeloraQuantizer, layout: Layout, linears: dict[str, Source]
) -> list[WeightConverter]:
    """One for each kind of linear layer, such as `self_attn.q_proj`, that is packed anywhere."""
    kinds = sorted({".".join(name.removesuffix(".weight").split(".")[-2:]) for name in linears})
    found = []
    for kind in kinds:
        name = kind if layout.weight else f"{kind}.weight"
        parts = {rf"{re.escape(name + end)}$": part for end, part in layout.endings.items()}
        found.append(
            WeightConverter(list(parts), f"{kind}.weight", operations=[Dequantise(owner, layout, parts)])
        )
    return found


def told(model: nn.Module, linears: dict[str, Source], layout: Layout) -> None:
    """Says which layers are not as small as in the file."""
    if not linears:
        return
    size = sum(model.get_parameter(name).nbytes for name in linears)
    dtype = str(model.config.dtype).removeprefix("torch.")
    logging.getLogger("moelora").warning(
        "%d weights that no linear layer has are packed in the files (%s) and dequantised to %s (%.2f GB)",
        len(linears), layout.name, dtype, size / 1e9,
    )  # fmt: skip


def choice(weight: PackedWeight) -> Choice:
    """How the weight is packed, in the words of our own layout."""
    _, rows, columns = weight._replace(transposed=False).shape
    groups = weight.scale.shape[-1]
    if FORMATS[weight.format].groups.kind == "grid":
        least = FORMATS[weight.format].groups.least
        blocks = weight.scale.shape[1:] == (-(-rows // least), -(-columns // least))
        return Choice(weight.format, least if blocks else 0)
    return Choice(weight.format, columns // groups if groups > 1 else 0, weight.is_nested)


def described(weights: Mapping[str, PackedWeight]) -> tuple[Choice | None, dict[str, Choice]]:
    """How most of the weights are packed, and by name those that are packed otherwise."""
    found = {name: choice(weight) for name, weight in weights.items()}
    columns = {name: weight._replace(transposed=False).shape[2] for name, weight in weights.items()}

    def so(name: str, one: Choice) -> bool:
        """A group as long as the row is the whole row."""
        return found[name] == replace(
            one, group_size=0 if one.group_size == columns[name] else one.group_size
        )

    most = max(
        dict.fromkeys(found.values()), key=lambda one: sum(so(name, one) for name in found), default=None
    )
    return most, {name: one for name, one in found.items() if not so(name, most)}
