"""A layer's weights in a format of torch_moelora.formats, made once for all who run it."""

from __future__ import annotations

import weakref
from typing import ClassVar

from torch import Tensor

from torch_moelora import formats
from torch_moelora.formats import PackedWeight

from ..layer import DISTINCT, DTYPES, Layer

NESTED = "-nested"
FORMATS = tuple(
    name + suffix
    for name, row in formats.FORMATS.items()
    if row.bits is not None
    for suffix in ("", NESTED)[: 1 + row.nested]
)


class Packings:
    """A layer's weights in the formats that were asked for, as long as somebody holds them."""

    _found: ClassVar[weakref.WeakValueDictionary] = weakref.WeakValueDictionary()

    def __init__(self, layer: Layer, name: str) -> None:
        self.source = weakref.ref(layer.weights["down"])
        self.dtype = DTYPES[layer.case.dtype]
        self.weights = {part: _pack(weight, name) for part, weight in layer.weights.items()}

    @classmethod
    def of(cls, layer: Layer, name: str) -> Packings:
        found = cls._found.get(name)
        if found is None or found.source() is not layer.weights["down"]:
            found = cls._found[name] = cls(layer, name)
        return found

    def numbers(self) -> dict[str, Tensor]:
        """What they stand for, in the layer's dtype."""
        return {part: weight.dequantize(self.dtype) for part, weight in self.weights.items()}

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())


def _pack(weight: Tensor, name: str) -> PackedWeight:
    """[E, N, K]; experts from DISTINCT on are copies of the first."""
    experts = len(weight)
    part = formats.quantize(weight[:DISTINCT], name.removesuffix(NESTED), nested=name.endswith(NESTED))
    rest = experts % DISTINCT
    parts = [part] * (experts // DISTINCT) + ([part.experts(0, rest)] if rest and experts > DISTINCT else [])
    return formats.stack(parts) if parts else part
